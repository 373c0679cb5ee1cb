#!/usr/bin/env python3
"""Our adapters in other people's programs: is it the same model?

    "$(bench/peers/setup.sh)" bench/peers/adapter_peer.py build/release/bench/bench_logits [--gguf FILE]

needs torch, transformers, peft, gguf and llama-cpp-python (bench/peers/setup.sh). For the tiny random model of each
architecture in tests/golden/folders, and a GGUF file that this script makes of it with the names of the `gguf` package
(F32; llama's q and k permuted, gemma3's norms + 1):

  ours, folder | ours, gguf      bench_logits on either form, base and with a random LoRA on all linears
  transformers + PEFT            the folder, and our PEFT export of that LoRA, in float64
  llama.cpp                      the GGUF file, and our GGUF adapter; caches in F32, no flash attention

With --gguf also a real model (SmolLM2's Q4_1 file): ours and llama.cpp, and transformers over the dequantised file with
our PEFT export. llama.cpp rounds activations to 8 bits for quantised matrices; the table shows what that makes, and what is
left of it with the weights in F32.

Prints the largest difference of a logit from the reference in each row, beside the largest logit; ends with 1 if one
exceeds 1e-4 of it (rows of 8-bit activations: 5e-2).
"""

import argparse
import ctypes
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import gguf
import llama_cpp
import numpy as np
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

FOLDERS = Path(__file__).resolve().parents[2] / "tests/golden/folders"
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


def ours(program, model, ids, *more):
    out = subprocess.run([program, "--model", model, "--ids", ",".join(map(str, ids)), *more], check=True,
                         capture_output=True, text=True).stdout
    return np.array([[float(v) for v in line.split()] for line in out.splitlines()])


def torch_logits(model, ids):
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].double().numpy()


def to_gguf(folder, path):
    config = json.loads((folder / "config.json").read_text())
    name = config["model_type"].removesuffix("_text")
    arch = next(a for a, n in gguf.MODEL_ARCH_NAMES.items() if n == name)
    names = gguf.get_tensor_name_map(arch, config["num_hidden_layers"])
    rope = config["rope_parameters"]
    full = rope.get("full_attention", rope)
    head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    w = gguf.GGUFWriter(path, name)
    w.add_context_length(config["max_position_embeddings"])
    w.add_embedding_length(config["hidden_size"])
    w.add_block_count(config["num_hidden_layers"])
    w.add_feed_forward_length(config["intermediate_size"])
    w.add_head_count(config["num_attention_heads"])
    w.add_head_count_kv(config["num_key_value_heads"])
    w.add_key_length(head)
    w.add_value_length(head)
    w.add_layer_norm_rms_eps(config["rms_norm_eps"])
    w.add_rope_freq_base(full["rope_theta"])
    w.add_vocab_size(config["vocab_size"])
    w.add_tokenizer_model("no_vocab")
    if name == "glm4":
        w.add_rope_dimension_count(int(head * full["partial_rotary_factor"]))
    if full["rope_type"] == "linear":
        w.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        w.add_rope_scaling_factor(full["factor"])
    if name == "gemma3":
        w.add_sliding_window(config["sliding_window"])
        w.add_sliding_window_pattern([t == "sliding_attention" for t in config["layer_types"]])
    if full["rope_type"] == "llama3":
        inv = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS["llama3"](
            transformers.AutoConfig.from_pretrained(folder), None)[0]
        plain = 1.0 / (full["rope_theta"] ** (torch.arange(0, head, 2).float() / head))
        w.add_tensor("rope_freqs.weight", (plain / inv).numpy().astype(np.float32))
    for shard in sorted(folder.glob("*.safetensors")):
        for hf, t in load_file(shard).items():
            t = t.float().numpy()
            if name == "gemma3" and "norm" in hf:
                t = t + 1
            if name == "llama" and ("q_proj" in hf or "k_proj" in hf):
                heads = t.shape[0] // head
                t = t.reshape(heads, 2, head // 2, -1).swapaxes(1, 2).reshape(t.shape)
            w.add_tensor(names.get_name(hf, try_suffixes=(".weight", ".bias")), np.ascontiguousarray(t))
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


def dequantised(file, path):
    """The same weights in F32: llama.cpp computes with those as we do, without rounding activations to 8 bits."""
    reader = gguf.GGUFReader(file)
    arch = reader.fields["general.architecture"].contents()
    w = gguf.GGUFWriter(path, arch)
    for key, field in reader.fields.items():
        if key.startswith(arch + ".") and key != f"{arch}.vocab_size":
            w.add_key_value(key, field.contents(), field.types[0], field.types[1] if len(field.types) > 1 else None)
    w.add_vocab_size(next(int(t.shape[1]) for t in reader.tensors if t.name == "token_embd.weight"))
    w.add_tokenizer_model("no_vocab")
    for t in reader.tensors:
        w.add_tensor(t.name, gguf.quants.dequantize(t.data, t.tensor_type).astype(np.float32))
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


def llama_logits(path, adapter, ids):
    params = llama_cpp.llama_model_default_params()
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
    if not model:
        sys.exit(f"llama.cpp does not load {path}")
    params = llama_cpp.llama_context_default_params()
    params.n_ctx = params.n_batch = params.n_ubatch = 512
    params.type_k = params.type_v = 0
    params.flash_attn_type = 0
    ctx = llama_cpp.llama_init_from_model(model, params)
    if adapter:
        lora = llama_cpp.llama_adapter_lora_init(model, str(adapter).encode())
        if not lora:
            sys.exit(f"llama.cpp does not load {adapter}")
        llama_cpp.llama_set_adapters_lora(ctx, (llama_cpp.llama_adapter_lora_p_ctypes * 1)(lora), 1, (ctypes.c_float * 1)(1.0))
    batch = llama_cpp.llama_batch_init(len(ids), 0, 1)
    batch.n_tokens = len(ids)
    for i, token in enumerate(ids):
        batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = token, i, 1, 0, 1
    if llama_cpp.llama_decode(ctx, batch) != 0:
        sys.exit("llama.cpp does not compute")
    n = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    out = np.array([np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(ctx, i), shape=(n,)).copy()
                    for i in range(len(ids))], dtype=np.float64)
    llama_cpp.llama_batch_free(batch)
    llama_cpp.llama_free(ctx)
    llama_cpp.llama_model_free(model)
    return out


failed = False


def row(what, got, reference, bound=1e-4):
    global failed
    worst, largest = np.abs(got - reference).max(), np.abs(reference).max()
    bad = not worst <= bound * largest
    failed |= bad
    print(f"  {what:<44} {worst:9.2e}  of {largest:6.2f}{'   TOO FAR' if bad else ''}", flush=True)


def tiny(program, folder, work):
    ids = json.loads((folder / "expected.json").read_text())["ids"]
    if folder.name == "gemma3":  # a GGUF file has no place for an attention scale of the file's own
        changed = json.loads((folder / "config.json").read_text())
        changed["query_pre_attn_scalar"] = changed["head_dim"]
        folder = Path(shutil.copytree(folder, work / "gemma3"))
        (folder / "config.json").write_text(json.dumps(changed))
    file, adapter, peft = work / "model.gguf", work / "adapter.gguf", work / "peft"
    to_gguf(folder, file)
    rank = "5:sqrt" if folder.name in ("llama", "glm4") else "4"
    base = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float64)
    reference = torch_logits(base, ids)
    print(f"{folder.name}, the base model: difference from transformers")
    row("ours, folder", ours(program, folder, ids), reference)
    row("ours, gguf", ours(program, file, ids), reference)
    row("llama.cpp, gguf", llama_logits(file, None, ids), reference)
    print(f"{folder.name}, LoRA of rank {rank}: difference from transformers + PEFT with our export")
    from_folder = ours(program, folder, ids, "--random", rank, "--peft", peft, "--gguf", adapter)
    adapted = torch_logits(PeftModel.from_pretrained(base, peft).double(), ids)
    row("ours, folder", from_folder, adapted)
    row("ours, folder, adapter read back from GGUF", ours(program, folder, ids, "--adapter", adapter), adapted)
    row("ours, gguf, adapter read back from PEFT", ours(program, file, ids, "--adapter", peft), adapted)
    row("llama.cpp, gguf, our GGUF adapter", llama_logits(file, adapter, ids), adapted)
    row("  (what the adapter changes)", reference, adapted, np.inf)


def real(program, file, work):
    ids = [1, 4093, 198, 2683, 359, 260, 3575, 282, 4649, 47, 2, 198, 1, 520, 9531, 198]
    adapter, peft, plain = work / "real.gguf", work / "real-peft", work / "plain.gguf"
    dequantised(file, plain)
    base = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, attn_implementation="eager",
                                                dtype=torch.float32)
    reference = torch_logits(base, ids)
    print(f"{file.name}, the base model: difference from transformers on the dequantised weights")
    row("ours", ours(program, file, ids), reference, 1e-3)
    row("llama.cpp (8-bit activations)", llama_logits(file, None, ids), reference, 5e-2)
    row("llama.cpp, dequantised", llama_logits(plain, None, ids), reference, 1e-3)
    got = ours(program, file, ids, "--random", "8", "--peft", peft, "--gguf", adapter)
    adapted = torch_logits(PeftModel.from_pretrained(base, peft), ids)
    print(f"{file.name}, LoRA of rank 8: difference from transformers + PEFT with our export")
    row("ours", got, adapted, 1e-3)
    row("ours, adapter read back from PEFT", ours(program, file, ids, "--adapter", peft), adapted, 1e-3)
    row("ours, adapter read back from GGUF", ours(program, file, ids, "--adapter", adapter), adapted, 1e-3)
    row("llama.cpp, our GGUF adapter", llama_logits(file, adapter, ids), adapted, 5e-2)
    row("llama.cpp, dequantised, our GGUF adapter", llama_logits(plain, adapter, ids), adapted, 1e-3)
    row("  (what the adapter changes)", reference, adapted, np.inf)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("program", type=Path)
    parser.add_argument("--gguf", type=Path)
    parser.add_argument("--only", help="one architecture")
    args = parser.parse_args()
    silent = llama_cpp.llama_log_callback(lambda level, text, data: None)
    llama_cpp.llama_log_set(silent, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    with tempfile.TemporaryDirectory() as work:
        for folder in sorted(FOLDERS.iterdir()):
            if args.only in (None, folder.name):
                tiny(args.program, folder, Path(work))
        if args.gguf:
            real(args.program, args.gguf, Path(work))
    sys.exit(failed)


if __name__ == "__main__":
    main()
