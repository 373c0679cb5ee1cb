#!/usr/bin/env python3
"""Makes tokenizers.json and vocabularies.json beside itself: what the reference tokenizers of each kind do with the
strings of tokens.json and some more.

    make_tokenizers.py [--gemma GEMMA.gguf] [--qwen qwen.tiktoken] [--llama3 tokenizer.model] [--write FOLDER]

The reference is the `tokenizers` package, set up as each model's tokenizer.json sets it up:

    qwen2      Qwen2, Qwen2.5, Qwen3      NFC, cl100k's pattern with single digits
    llama-bpe  Llama 3                    the pattern with up to three digits, ignore_merges
    glm4       GLM-4-0414                 the same
    gemma      Gemma 3                    spaces become U+2581, one word, byte fallback, user-defined tokens

Small vocabularies are trained here on the strings themselves; they stand in tokenizers.json as whole tokenizer.json files,
ids included. Some tokens have no merges that lead to them, which is what ignore_merges is about. Gemma's has a score for
each token, too: what its GGUF files carry, and what the merges follow from (generate_merges in
transformers/convert_slow_tokenizer.py).

vocabularies.json has the ids over real vocabularies. Gemma 3's comes from scripts/fetch-model.sh --gemma, Qwen's from
dashscope 1.14.1 (dashscope/resources/qwen.tiktoken), Llama 3's from llama-models 0.0.63
(llama_models/llama3/api/tokenizer.model); of GLM-4's no package is known. The latter two are lists of tokens and ranks; the
merges follow from them as in TikTokenConverter of transformers, and with --write the tokenizer.json files that come of
it are put into FOLDER as qwen2.json and llama-bpe.json, where the tests look for them (CONSILIUM_VOCABULARIES). What is
not given is kept from the file that is there.

"cuts" are digests of where the pre-tokenizers cut, "ids" of the ids, one for each string, in order: strings of
tokens.json, then "extra". A digest is FNV-1a of 64 bits over little-endian 32-bit numbers, its
halves added without carry; of every 40th string the ids stand there as well.

Needs: pip install gguf tokenizers
"""
import argparse
import base64
import json
import os
import random

import make_tokens
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

FOLDER = os.path.dirname(os.path.abspath(__file__))
PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|NUMBERS| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
           r"|\s+(?!\S)|\s+")
ONE, THREE = PATTERN.replace("NUMBERS", r"\p{N}"), PATTERN.replace("NUMBERS", r"\p{N}{1,3}")
SPECIALS = {
    "qwen2": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    "llama-bpe": ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    "glm4": ["<|endoftext|>", "[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"],
    "gemma": ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"],
}
USER = {"qwen2": ["<tool_call>", "</tool_call>", "<think>", "</think>"], "llama-bpe": [], "glm4": ["<think>"],
        "gemma": ["\n", "\n\n", "\n\n\n", "▁▁", "▁▁▁", "▁▁▁▁", "<b>", "</b>"]}
WHOLE = ["Ġhydraulic", "Pneumonoultra", "æµĭè¯ķ", "Ġ1000", "'ll", "ĠĠĠĠ", "123"]


def extra():
    """What these patterns, NFC and Gemma's spaces make a difference for."""
    rng = random.Random(20260301)
    out = ["'ſ 'ſt it'ſx", "I'LL we'Re 'D' ''s 'S's \u2019s", "1234567 12 ½¾⅓¼ ٣٤٥٦ 1a2b", "!!\n\n x", "a \n b", " \n\n  x", "\r\n x",
           "x \u0085\n y", "\u2028x\u2029\n", "\t\tx\t.", "a\u00a0b", "  1", "\n1", ".\r\n\r\n.", "'\n's\n", "#hash $1 (word)",
           "e\u0301 e\u0323\u0302 e\u0302\u0323 \u0041\u030a \u212b \u2126", "\u1100\u1161\u11a8 \uac00\u11a8 \u1100\u1161",
           "\u0958 \u0915\u093c \ufb1d \u05d9\u05b4 \u2adc", "q\u0307\u0323\u0307\u0323 a\u0315\u0300\u05ae\u0300\u0062",
           "\u0344 \u0308\u0301 \u1fee \u03b1\u0345\u0313\u0301", "\u0301\u0301 x\u0301\n\u0301", "<think>\n\n</think>\n\nYes <tool_call> x",
           "<b>bold</b>\n\n\n\n\n  two   three    four     five", " " * 33 + "t", "\n" * 33, "▁ literal▁▁mark", "<0x41> <0x0a>", "aaaa aaaaaaa haha"]
    marks = ["\u0301", "\u0323", "\u0327", "\u0345", "\u05b0", "\u3099", "\u0f71", "\u1161", "\u11a8", "\u09be", "\u0338"]
    bases = ["a", "e", "o", "A", " ", "\u1100", "\uac00", "\u304b", "\u09c7", "=", "<", "\u00e9", "\u1e0b", "\n", "1"]
    for _ in range(120):
        out.append("".join(rng.choice(bases) + "".join(rng.choice(marks) for _ in range(rng.randint(0, 3)))
                           for _ in range(rng.randint(1, 6))))
    parts = ["'", "s", "S", "'T", "'re", "'VE", "ſ", "ab", "Z", "é", "中", " ", "  ", "\n", "\r\n", "\t", "\u3000", "1", "23", "½", ".", "!?",
             "\u0301", "\u200d", "👍", "_", "<", ">"]
    for _ in range(250):
        out.append("".join(rng.choice(parts) for _ in range(rng.randint(2, 16))))
    return out


def digest(numbers):
    h = 0xcbf29ce484222325
    for n in numbers:
        for byte in n.to_bytes(4, "little"):
            h = ((h ^ byte) * 0x100000001b3) % 2**64
    return f"{(h ^ h >> 32) % 2**32:08x}"


def splitter(pattern):
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"),
                                    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def trained_bytes(kind, texts):
    """A byte-level tokenizer; for those with ignore_merges some words are tokens that no merges lead to."""
    def prepared(model):
        tokenizer = Tokenizer(model)
        tokenizer.normalizer = normalizers.NFC() if kind == "qwen2" else None
        tokenizer.pre_tokenizer = splitter(ONE if kind == "qwen2" else THREE)
        tokenizer.decoder = decoders.ByteLevel()
        return tokenizer
    learner = prepared(models.BPE())
    learner.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=520, show_progress=False,
                                                           initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    model = json.loads(learner.to_str())["model"]
    vocab, merges = model["vocab"], [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in model["merges"]]
    for word in (WHOLE if kind != "qwen2" else []):
        vocab.setdefault(word, len(vocab))
    tokenizer = prepared(models.BPE(vocab, merges, ignore_merges=kind != "qwen2"))
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t in USER[kind]])
    return tokenizer


def merges_of(scores):
    """generate_merges of transformers, over {text: score} in the order of the ids."""
    ids = {text: i for i, text in enumerate(scores)}
    out = []
    for text, score in scores.items():
        cuts = [(text[:i], text[i:], score) for i in range(1, len(text)) if text[:i] in ids and text[i:] in ids]
        out.extend(sorted(cuts, key=lambda cut: (ids[cut[0]], ids[cut[1]])))
    return [(left, right) for left, right, _ in sorted(out, key=lambda c: (c[2], len(c[0]), len(c[1])), reverse=True)]


def gemma_of(scores, user):
    tokenizer = Tokenizer(models.BPE({t: i for i, t in enumerate(scores)}, merges_of(scores), unk_token="<unk>", fuse_unk=True,
                                     byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_tokens([AddedToken(t, normalized=True) for t in user])
    return tokenizer


def trained_gemma(texts):
    """Its alphabet is not the whole of the strings', so that bytes have to stand in. Returns it and its scores."""
    learner = Tokenizer(models.BPE())
    learner.normalizer = normalizers.Replace(" ", "▁")
    learner.train_from_iterator([t for t in texts if all(ord(c) < 0x2000 for c in t)],
                                trainers.BpeTrainer(vocab_size=900, show_progress=False, limit_alphabet=300))
    learned = [t for t, _ in sorted(learner.get_vocab().items(), key=lambda item: item[1]) if t not in USER["gemma"]]
    # As SentencePiece has them: longer pieces by rank, then the characters.
    normal = [t for t in learned if len(t) > 1] + [t for t in learned if len(t) == 1 and t != "▁"] + ["▁"]
    scores = {t: -1000.0 for t in SPECIALS["gemma"] + USER["gemma"]}
    scores |= {f"<0x{b:02X}>": 0.0 for b in range(256)}
    scores |= {t: -float(i) for i, t in enumerate(normal)}
    return gemma_of(scores, USER["gemma"]), [int(s) for s in scores.values()]


def real_gemma(path):
    import gguf
    fields = gguf.GGUFReader(path).fields
    texts, scores, kinds = (fields["tokenizer.ggml." + k].contents() for k in ("tokens", "scores", "token_type"))
    texts = [t.replace(" ", "▁") if k == 4 else t for t, k in zip(texts, kinds)]  # as in the SentencePiece file
    return gemma_of(dict(zip(texts, scores)), [t for t, k in zip(texts, kinds) if k == 4])


def byte_names():
    """GPT-2's characters for bytes."""
    own = [*range(0x21, 0x7f), *range(0xa1, 0xad), *range(0xae, 0x100)]
    names = {b: chr(b) for b in own}
    return names | {b: chr(0x100 + i) for i, b in enumerate(b for b in range(256) if b not in own)}


def real_bytes(path, kind):
    names = byte_names()
    ranks = {base64.b64decode(line.split()[0]): int(line.split()[1]) for line in open(path, "rb") if line.strip()}
    named = {token: "".join(names[b] for b in token) for token in ranks}
    merges = []
    for token, rank in ranks.items():
        cuts = [(token[:i], token[i:]) for i in range(1, len(token)) if token[:i] in ranks and token[i:] in ranks]
        merges += [(rank, left, right) for left, right in sorted(cuts, key=lambda cut: (ranks[cut[0]], ranks[cut[1]]))]
    merges.sort(key=lambda merge: merge[0])
    tokenizer = Tokenizer(models.BPE({named[t]: r for t, r in ranks.items()}, [(named[l], named[r]) for _, l, r in merges],
                                     ignore_merges=kind != "qwen2"))
    tokenizer.normalizer = normalizers.NFC() if kind == "qwen2" else None
    tokenizer.pre_tokenizer = splitter(ONE if kind == "qwen2" else THREE)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def compared(tokenizer, texts):
    ids = [tokenizer.encode(t, add_special_tokens=False).ids for t in texts]
    return {"digests": "".join(map(digest, ids)), "rows": [[i, ids[i]] for i in range(0, len(ids), 40)]}


def cuts(cutter, texts):
    def ends(text):
        out, at = [], 0
        for piece, _ in cutter.pre_tokenize_str(text):
            at += len(piece)  # ByteLevel: a character for each byte
            out.append(at)
        return out
    return "".join(digest(ends(t)) for t in texts)


def dump(name, content):
    with open(os.path.join(FOLDER, name), "w") as out:
        json.dump(content, out, ensure_ascii=False, separators=(",", ":"))
        out.write("\n")


def main():
    parser = argparse.ArgumentParser()
    for option in ("--gemma", "--qwen", "--llama3", "--write"):
        parser.add_argument(option)
    given = parser.parse_args()
    old = json.load(open(os.path.join(FOLDER, "tokens.json")))
    more = extra()
    texts = [row[0] for row in old["rows"]] + more
    smollm = make_tokens.prepared(Tokenizer(models.BPE())).pre_tokenizer
    out = {"extra": more, "kinds": {}}
    out["cuts"] = {"smollm": cuts(smollm, texts), "qwen2": cuts(splitter(ONE), texts), "llama-bpe": cuts(splitter(THREE), texts)}
    for kind in SPECIALS:
        tokenizer, scores = trained_gemma(texts) if kind == "gemma" else (trained_bytes(kind, texts), None)
        ids = compared(tokenizer, texts)
        tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIALS[kind]])
        marked = ["x".join(SPECIALS[kind]) + t for t in ["", " a b", "\n\n1"]]
        out["kinds"][kind] = {"tokenizer": json.loads(tokenizer.to_str()), "scores": scores, "ids": ids,
                              "marked": [[t, tokenizer.encode(t, add_special_tokens=False).ids] for t in marked]}
    dump("tokenizers.json", out)
    path = os.path.join(FOLDER, "vocabularies.json")
    real = json.load(open(path)) if os.path.exists(path) else {}
    if given.gemma:
        real["gemma"] = compared(real_gemma(given.gemma), texts)
    for kind, file in (("qwen2", given.qwen), ("llama-bpe", given.llama3)):
        if file:
            tokenizer = real_bytes(file, kind)
            real[kind] = compared(tokenizer, texts)
            tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIALS[kind]])
            if given.write:
                tokenizer.save(os.path.join(given.write, kind + ".json"))
    dump("vocabularies.json", real)


if __name__ == "__main__":
    main()
