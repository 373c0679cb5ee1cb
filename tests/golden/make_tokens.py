#!/usr/bin/env python3
"""Makes tokens.json: strings and the ids that the reference tokenizer gives them.

    make_tokens.py MODEL.gguf > tests/golden/tokens.json

The reference is the `tokenizers` package, set up as SmolLM2's tokenizer.json is (Digits(individual), then ByteLevel with
GPT-2's pattern, BPE without an unknown token) from the vocabulary and merges that the GGUF file carries. A second, small
vocabulary is trained here on the strings themselves, so that the test has something to run on without the model. Random
characters are drawn from those assigned in Unicode 3.2, whose categories every table agrees on.

Needs: pip install gguf tokenizers
"""
import json
import random
import sys
import unicodedata

import gguf
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]

PHRASES = """Acute bronchitis due to Mycoplasma pneumoniae
Type 2 diabetes mellitus with hyperglycaemia
Displaced fracture of body of hamate [unciform] bone, left wrist, subsequent encounter for fracture with nonunion
Atherosclerosis of native arteries of extremities with rest pain, bilateral legs
What's the patient's dose? It's 12.5 mg/kg, they're sure we've 3 left; I'd say he'll take 1000000.
DON'T SHOUT, IT'S LATE. we'LL 'S 't 'ret'
  leading spaces and trailing spaces   
tab\tseparated\t\tvalues\t\n\n\nthree newlines\r\nand CRLF \n
int main(void) { return x->y[3] != 0x1F ? a++ : --b; } // don't
#include <stdio.h>\n\n    if (a && b)\n\t\treturn 1;\n
{"messages": [{"role": "user", "content": "hi"}]}
https://example.org/path?query=1&other=%20#fragment
naïve façade coöperate Ångström Straße İstanbul ﬁne ﬂow ① ½ ² ³ Ⅷ ٣٤٥ १२३ 𝟘𝟙
Привет, мир! Это тест 42.
你好，世界。这是一个测试123。
こんにちは世界、テストです。 カタカナ
안녕하세요 세계 테스트
مرحبا بالعالم ١٢٣
שלום עולם
नमस्ते दुनिया क्षत्रिय
สวัสดีชาวโลก
Γειά σου Κόσμε
👍🏽 👨‍👩‍👧‍👦 🇩🇪 🏳️‍🌈 ❤️ ☃ ♠♣
é é ñ ö ​‌‍﻿
<|im_start|>user\nignore that<|im_end|> <|endoftext|> <|im_start <|im_end|>|>
hydraulic pump leaking; replaced o-ring, bucket teeth worn, engine won't start
∀x∈ℝ: ⌈x⌉ = −⌊−x⌋, α∧¬β → γ ± 5 × 10⁻³ µm
aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa
________________________________________________________________________________________________________________
====------*****!!!!!?????.....,,,,,;;;;;:::::"'"''''`````~~~~~
Pneumonoultramicroscopicsilicovolcanoconiosisandhepaticocholangiogastrostomyandesophagogastroduodenoscopy""".replace(
    "\\t", "\t").replace("\\n", "\n").replace("\\r", "\r").split("\n")
SPACES = [" ", "  ", "   ", "\t", "\n", "\r\n", "\u00a0", "\u2003", "\u3000", "\u2028", "\u0085", "\u1680", "\x0b", "\x0c",
          "\u200b", "\u180e", "\ufeff", "\x1c", "\x1f"]


def characters():
    old = unicodedata.ucd_3_2_0
    return [chr(c) for c in range(0x110000)
            if not 0xD800 <= c < 0xE000 and old.category(chr(c)) not in ("Cn", "Co")
            and old.category(chr(c)) == unicodedata.category(chr(c))]


def strings():
    rng = random.Random(20240601)
    chars = characters()
    by_kind = {}
    for c in chars:
        by_kind.setdefault(unicodedata.category(c), []).append(c)
    words = [w for p in PHRASES for w in p.split()]
    out = list(PHRASES) + SPACES + [""]
    for _ in range(330):  # words of the phrases with all kinds of space between them
        out.append("".join(rng.choice(words) + rng.choice(SPACES[:8] + [" "] * 12) for _ in range(rng.randint(1, 7))))
    for _ in range(200):  # characters of one category each, mixed
        out.append("".join(rng.choice(by_kind[rng.choice(sorted(by_kind))]) for _ in range(rng.randint(1, 10))))
    for _ in range(150):  # any characters
        out.append("".join(rng.choice(chars) for _ in range(rng.randint(1, 6))))
    for _ in range(250):  # a dense mixture of what the pattern tells apart
        pieces = [" ", "  ", "\n", "\t", "'", "'s", "'ll", "'D", "a", "Bc", "1", "23", ".", "!?", "é", "中", "½", "\u00a0", "\u0301"]
        out.append("".join(rng.choice(pieces) for _ in range(rng.randint(2, 14))))
    for _ in range(150):  # bytes of ASCII
        out.append("".join(chr(rng.randint(1, 127)) for _ in range(rng.randint(1, 16))))
    return out


def prepared(tokenizer):
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def from_gguf(path):
    fields = gguf.GGUFReader(path).fields
    tokens = fields["tokenizer.ggml.tokens"].contents()
    merges = [tuple(m.split(" ")) for m in fields["tokenizer.ggml.merges"].contents()]
    return prepared(Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, merges)))


def trained(texts):
    tokenizer = prepared(Tokenizer(models.BPE()))
    trainer = trainers.BpeTrainer(vocab_size=560, special_tokens=SPECIALS, show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(texts, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    tokens = [t for t, _ in sorted(model["vocab"].items(), key=lambda item: item[1])]
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    plain = prepared(Tokenizer(models.BPE(model["vocab"], [tuple(m.split(" ")) for m in merges])))
    return tokens, merges, plain


def main():
    texts = strings()
    real = from_gguf(sys.argv[1])
    tokens, merges, small = trained(texts)
    control = from_gguf(sys.argv[1])
    control.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIALS])
    marked = [t for t in texts if "<|" in t] + [
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello 12<|im_end|>\n<|im_start|>assistant\n",
        "<|im_start|><|im_start|>a<|im_end|><|endoftext|>", " <|im_end|> x"]
    rows = [[t, real.encode(t).ids] + ([small.encode(t).ids] if i % 4 == 0 else []) for i, t in enumerate(texts)]
    print("{")
    print('"small": ' + json.dumps({"tokens": tokens, "merges": merges, "control": len(SPECIALS)}, ensure_ascii=False,
                                    separators=(",", ":")) + ",")
    print('"marked": ' + json.dumps([[t, control.encode(t).ids] for t in marked], separators=(",", ":")) + ",")
    print('"rows": [')
    print(",\n".join(json.dumps(r, ensure_ascii=False, separators=(",", ":")) for r in rows))
    print("]}")


if __name__ == "__main__":
    main()
