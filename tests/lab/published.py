"""Names and shapes of the tensors in published files, written down from their sources; no weights."""

from __future__ import annotations

Shapes = dict[str, tuple[int, ...]]

FLUX_WIDTH = 3072


def flux1(*, double: int = 19, single: int = 38, guidance: bool = True, reads: int = 64) -> Shapes:
    """A FLUX.1 file: ``flux1-dev.safetensors``, ``flux1-schnell.safetensors`` (no guidance),
    ``flux1-fill-dev.safetensors`` (reads 384), ``flux1-depth-dev.safetensors`` (reads 128).

    Source: https://github.com/black-forest-labs/flux (src/flux/model.py, src/flux/modules/layers.py; the
    numbers in src/flux/util.py).
    """
    width = FLUX_WIDTH
    modules = {"img_in": (width, reads), "txt_in": (width, 4096)}
    for name, inputs in (("time_in", 256), ("vector_in", 768), ("guidance_in", 256))[: 3 if guidance else 2]:
        modules |= {f"{name}.in_layer": (width, inputs), f"{name}.out_layer": (width, width)}
    for block in range(double):
        for stream in ("img", "txt"):
            modules[f"double_blocks.{block}.{stream}_mod.lin"] = (6 * width, width)
    for block in range(single):
        modules[f"single_blocks.{block}.modulation.lin"] = (3 * width, width)
    modules["final_layer.adaLN_modulation.1"] = (2 * width, width)
    return _with_biases(modules) | _flux_blocks(double, single)


def chroma(*, double: int = 19, single: int = 38) -> Shapes:
    """A Chroma file: FLUX.1's blocks, their modulation computed by one small network for all.

    Source: https://github.com/lodestone-rock/flow (src/models/chroma/model.py).
    """
    width, hidden = FLUX_WIDTH, 5120
    modules = {
        "img_in": (width, 64),
        "txt_in": (width, 4096),
        "distilled_guidance_layer.in_proj": (hidden, 64),
        "distilled_guidance_layer.out_proj": (width, hidden),
    }
    norms: Shapes = {}
    for layer in range(5):
        place = f"distilled_guidance_layer.layers.{layer}"
        modules |= {f"{place}.in_layer": (hidden, hidden), f"{place}.out_layer": (hidden, hidden)}
        norms[f"distilled_guidance_layer.norms.{layer}.scale"] = (hidden,)
    return _with_biases(modules) | norms | _flux_blocks(double, single)


def _flux_blocks(double: int, single: int) -> Shapes:
    width = FLUX_WIDTH
    modules: Shapes = {"final_layer.linear": (64, width)}
    norms: Shapes = {}
    for block in range(double):
        for stream in ("img", "txt"):
            place = f"double_blocks.{block}.{stream}"
            modules |= {
                f"{place}_attn.qkv": (3 * width, width),
                f"{place}_attn.proj": (width, width),
                f"{place}_mlp.0": (4 * width, width),
                f"{place}_mlp.2": (width, 4 * width),
            }
            norms |= {f"{place}_attn.norm.{each}_norm.scale": (128,) for each in ("query", "key")}
    for block in range(single):
        place = f"single_blocks.{block}"
        modules |= {f"{place}.linear1": (7 * width, width), f"{place}.linear2": (width, 5 * width)}
        norms |= {f"{place}.norm.{each}_norm.scale": (128,) for each in ("query", "key")}
    return _with_biases(modules) | norms


def sd3(*, blocks: int = 38, positions: int = 192, normed: bool = True, dual: int = 0) -> Shapes:
    """``sd3.5_large.safetensors`` without its prefix; ``sd3.5_medium`` has 24 blocks, 13 of them with a
    second attention, and a table of 384 x 384 places; ``sd3_medium`` has 24 and no norms of queries and keys.

    Source: https://github.com/Stability-AI/sd3.5 (mmditx.py, sd3_impls.py).
    """
    width = 64 * blocks
    modules = {
        "context_embedder": (width, 4096),
        "t_embedder.mlp.0": (width, 256),
        "t_embedder.mlp.2": (width, width),
        "y_embedder.mlp.0": (width, 2048),
        "y_embedder.mlp.2": (width, width),
        "final_layer.linear": (64, width),
        "final_layer.adaLN_modulation.1": (2 * width, width),
        "x_embedder.proj": (width, 16, 2, 2),
    }
    plain: Shapes = {"pos_embed": (1, positions**2, width)}
    for block in range(blocks):
        for stream in ("x", "context"):
            place = f"joint_blocks.{block}.{stream}_block"
            attentions = ["attn", *(["attn2"] if stream == "x" and block < dual else [])]
            last = stream == "context" and block == blocks - 1  # whose output nothing reads
            parts = 2 if last else 3 + 3 * len(attentions)
            modules[f"{place}.adaLN_modulation.1"] = (parts * width, width)
            for attention in attentions:
                modules[f"{place}.{attention}.qkv"] = (3 * width, width)
                if not last:
                    modules[f"{place}.{attention}.proj"] = (width, width)
                if normed:
                    plain |= {f"{place}.{attention}.ln_{each}.weight": (64,) for each in "qk"}
            if not last:
                modules |= {
                    f"{place}.mlp.fc1": (4 * width, width),
                    f"{place}.mlp.fc2": (width, 4 * width),
                }
    return _with_biases(modules) | plain


def qwen_image(*, blocks: int = 60) -> Shapes:
    """``qwen_image_bf16.safetensors`` and, of the same names, Qwen-Image-Edit's.

    Source: https://huggingface.co/Qwen/Qwen-Image
    (transformer/diffusion_pytorch_model.safetensors.index.json, whose total_size is 40,860,802,176 bytes).
    """
    width, context = 3072, 3584
    modules = {
        "img_in": (width, 64),
        "txt_in": (width, context),
        "time_text_embed.timestep_embedder.linear_1": (width, 256),
        "time_text_embed.timestep_embedder.linear_2": (width, width),
        "norm_out.linear": (2 * width, width),
        "proj_out": (64, width),
    }
    norms: Shapes = {"txt_norm.weight": (context,)}
    projections = (
        *(f"to_{each}" for each in "qkv"),
        *(f"add_{each}_proj" for each in "qkv"),
        "to_out.0",
        "to_add_out",
    )
    for block in range(blocks):
        place = f"transformer_blocks.{block}"
        modules |= {f"{place}.attn.{each}": (width, width) for each in projections}
        for stream in ("img", "txt"):
            modules |= {
                f"{place}.{stream}_mod.1": (6 * width, width),
                f"{place}.{stream}_mlp.net.0.proj": (4 * width, width),
                f"{place}.{stream}_mlp.net.2": (width, 4 * width),
            }
        norms |= {f"{place}.attn.norm_{each}.weight": (128,) for each in ("q", "k", "added_q", "added_k")}
    return _with_biases(modules) | norms


def qwen25_vl() -> Shapes:
    """``qwen_2.5_vl_7b.safetensors``, and the shards of Qwen2.5-VL-7B-Instruct.

    Source: https://huggingface.co/Qwen/Qwen2.5-VL-7B-Instruct (model.safetensors.index.json, whose total_size
    is 16,584,333,312 bytes).
    """
    width, seen = 3584, 1280
    biased: Shapes = {"visual.merger.mlp.0": (4 * seen, 4 * seen), "visual.merger.mlp.2": (width, 4 * seen)}
    plain: Shapes = {
        "model.embed_tokens.weight": (152064, width),
        "lm_head.weight": (152064, width),
        "model.norm.weight": (width,),
        "visual.patch_embed.proj.weight": (seen, 3, 2, 14, 14),
        "visual.merger.ln_q.weight": (seen,),
    }
    for layer in range(28):
        place = f"model.layers.{layer}"
        biased[f"{place}.self_attn.q_proj"] = (width, width)
        biased |= {f"{place}.self_attn.{each}_proj": (512, width) for each in "kv"}
        plain[f"{place}.self_attn.o_proj.weight"] = (width, width)
        plain |= {f"{place}.mlp.{each}_proj.weight": (18944, width) for each in ("gate", "up")}
        plain[f"{place}.mlp.down_proj.weight"] = (width, 18944)
        plain |= {f"{place}.{each}_layernorm.weight": (width,) for each in ("input", "post_attention")}
    for layer in range(32):
        place = f"visual.blocks.{layer}"
        biased |= {f"{place}.attn.qkv": (3 * seen, seen), f"{place}.attn.proj": (seen, seen)}
        biased |= {f"{place}.mlp.{each}_proj": (3420, seen) for each in ("gate", "up")}
        biased[f"{place}.mlp.down_proj"] = (seen, 3420)
        plain |= {f"{place}.norm{each}.weight": (seen,) for each in (1, 2)}
    return _with_biases(biased) | plain


def t5_xxl() -> Shapes:
    """``t5xxl_fp16.safetensors``: the encoder of google/t5-v1_1-xxl, its embedding under both of its names.

    Source: https://huggingface.co/comfyanonymous/flux_text_encoders.
    """
    width, hidden = 4096, 10240
    shapes: Shapes = {
        "shared.weight": (32128, width),
        "encoder.embed_tokens.weight": (32128, width),
        "encoder.final_layer_norm.weight": (width,),
        "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": (32, 64),
    }
    for layer in range(24):
        place = f"encoder.block.{layer}.layer"
        shapes |= {f"{place}.0.SelfAttention.{each}.weight": (width, width) for each in "qkvo"}
        shapes |= {f"{place}.1.DenseReluDense.{each}.weight": (hidden, width) for each in ("wi_0", "wi_1")}
        shapes[f"{place}.1.DenseReluDense.wo.weight"] = (width, hidden)
        shapes |= {f"{place}.{each}.layer_norm.weight": (width,) for each in (0, 1)}
    return shapes


def _with_biases(modules: Shapes) -> Shapes:
    weights = {f"{name}.weight": shape for name, shape in modules.items()}
    return weights | {f"{name}.bias": shape[:1] for name, shape in modules.items()}
