"""Components that several families are made of, each from its configuration alone.

This module owns their published namings. The renaming itself is diffusers' wherever it has one (its
``from_single_file`` uses the same functions).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from studio_worker.engine.families.component import Layout, Part, Tokenizer, read_json
from studio_worker.engine.families.parts.layer_names import by_table, comp_vis
from studio_worker.engine.files.sections import Tensors

_UNET = "model.diffusion_model."
"""diffusers' conversion of UNets wants the names of a whole checkpoint."""


def unet(kind: str, config_dir: Path) -> Part:
    """A Stable Diffusion UNet, in CompVis' latent-diffusion naming and in diffusers'."""
    config = read_json(config_dir / "config.json")
    channels, per_block = config["block_out_channels"], config["layers_per_block"]
    first, width = channels[0], config["cross_attention_dim"]
    level = next(i for i, block in enumerate(config["down_block_types"]) if block.startswith("CrossAttn"))
    reads = (channels[level], width)
    attention = "transformer_blocks.0.attn2.to_k.weight"
    ends = {"in": (first, config["in_channels"], 3, 3), "out": (config["out_channels"], first, 3, 3)}

    def rename(tensors: Tensors) -> Tensors:
        from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

        renamed: Tensors = convert_ldm_unet_checkpoint(
            {_UNET + name: tensor for name, tensor in tensors.items()}, config=config
        )
        return renamed

    original: dict[str, tuple[int | None, ...]] = {
        "input_blocks.0.0.weight": ends["in"],
        f"input_blocks.{1 + level * (per_block + 1)}.1.{attention}": reads,
        "out.2.weight": ends["out"],
    }
    diffusers: dict[str, tuple[int | None, ...]] = {
        "conv_in.weight": ends["in"],
        f"down_blocks.{level}.attentions.0.{attention}": reads,
        "conv_out.weight": ends["out"],
    }
    if sizes := config.get("projection_class_embeddings_input_dim"):  # pooled embedding and picture's size
        original["label_emb.0.0.weight"] = diffusers["add_embedding.linear_1.weight"] = (4 * first, sizes)
    return Part(
        kind=kind,
        role="diffusion-model",
        cls="diffusers.UNet2DConditionModel",
        config=config_dir,
        layouts=(Layout("original", original, rename), Layout("diffusers", diffusers)),
        other_names=comp_vis,
    )


_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
"""Names of the VAE's attention before diffusers 0.14, as sd-vae-ft-mse has them."""


def kl_vae(kind: str, config_dir: Path) -> Part:
    """An AutoencoderKL, in CompVis' naming (``ae.safetensors`` too) and in diffusers'."""
    config = read_json(config_dir / "config.json")
    last, latent = config["block_out_channels"][-1], config["latent_channels"]
    ends = {
        "decoder.conv_in.weight": (last, latent, 3, 3),
        "encoder.conv_out.weight": (2 * latent, last, 3, 3),
    }

    def original(tensors: Tensors) -> Tensors:
        from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

        renamed: Tensors = convert_ldm_vae_checkpoint(tensors, config=config)
        return renamed

    def diffusers(tensors: Tensors) -> Tensors:
        return {_new_attention(name): tensor for name, tensor in tensors.items()}

    first = (config["block_out_channels"][0],)
    return Part(
        kind=kind,
        role="vae",
        cls="diffusers.AutoencoderKL",
        config=config_dir,
        layouts=(
            Layout("original", ends | {"encoder.down.0.block.0.norm1.weight": first}, original),
            Layout("diffusers", ends | {"encoder.down_blocks.0.resnets.0.norm1.weight": first}, diffusers),
        ),
    )


def _new_attention(name: str) -> str:
    stem, _, kind = name.rpartition(".")
    owner, _, last = stem.rpartition(".")
    return f"{owner}.{_OLD_ATTENTION[last]}.{kind}" if last in _OLD_ATTENTION else name


def clip(kind: str, config_dir: Path, *, projected: bool = False) -> Part:
    """A CLIP text encoder, in transformers' namings, in open_clip's, and as stable-diffusion.cpp mixes them.

    Args:
        projected: whether its pooled output goes through the text projection.
    """
    config = read_json(config_dir / "config.json")
    vocabulary, width, layers = config["vocab_size"], config["hidden_size"], config["num_hidden_layers"]
    window = config["max_position_embeddings"]
    # transformers 5.6 took the wrapper ``text_model`` out of CLIPTextModel and left it in the projected one.
    wrapper = "text_model." if projected else ""

    def transformers(tensors: Tensors) -> Tensors:
        return {
            name if name.startswith("text_projection") else wrapper + name: tensor
            for name, tensor in _apart(tensors, width).items()
        }

    def cpp(tensors: Tensors) -> Tensors:
        named = {name.removeprefix("text_model."): tensor for name, tensor in tensors.items()}
        return transformers(_turned(named))

    def open_clip(tensors: Tensors) -> Tensors:
        return transformers(_from_open_clip(tensors))

    embedding, last = (vocabulary, width), f"encoder.layers.{layers - 1}.layer_norm1.weight"
    tells = {"embeddings.token_embedding.weight": embedding, last: (width,)}
    wrapped = {f"text_model.{name}": shape for name, shape in tells.items()}
    # What stable-diffusion.cpp made of a Stable Diffusion XL: the projection is open_clip's. Below other
    # prefixes it is transformers' under the same name.
    turned = wrapped | {"text_model.text_projection": (width, config["projection_dim"])}
    mixed = (Layout("stable-diffusion.cpp", turned, cpp, below="cond_stage_model."),) if projected else ()
    return Part(
        kind=kind,
        role="text-encoder",
        cls=f"transformers.CLIPTextModel{'WithProjection' if projected else ''}",
        config=config_dir,
        layouts=(
            *mixed,
            *Layout("transformers", tells, transformers).nested(("text_model.", "")),
            Layout(
                "open_clip",
                {"token_embedding.weight": embedding, "positional_embedding": (window, width)},
                open_clip,
            ),
        ),
        other_names=by_table(_clip_names(f"{wrapper}encoder.layers.N")),
    )


def _apart(tensors: Tensors, width: int) -> Tensors:
    """transformers' names: stable-diffusion.cpp keeps queries, keys and values in one, and calls the
    projection otherwise.
    """
    renamed: Tensors = {}
    for name, tensor in tensors.items():
        stem, fused, kind = name.partition("self_attn.in_proj.")
        if fused:
            for index, each in enumerate("qkv"):
                renamed[f"{stem}self_attn.{each}_proj.{kind}"] = tensor[index * width : (index + 1) * width]
        else:
            renamed["text_projection.weight" if name == "text_projection" else name] = tensor
    return renamed


def _turned(tensors: Tensors) -> Tensors:
    """The projection as transformers multiplies with it, from the left; open_clip does from the right."""
    from studio_worker.engine.files.weights import plain

    if "text_projection" not in tensors:
        return tensors
    return tensors | {"text_projection": plain(tensors["text_projection"]).T.contiguous()}


def _from_open_clip(tensors: Tensors) -> Tensors:
    """open_clip's names as transformers' without ``text_model.``."""
    renamed: Tensors = {}
    for name, tensor in _turned(tensors).items():
        if name in _OPEN_CLIP_ENDS:
            renamed[_OPEN_CLIP_ENDS[name]] = tensor
        elif name.startswith("transformer.resblocks."):
            _, _, block, rest = name.split(".", 3)
            place = f"encoder.layers.{block}."
            if rest.startswith("attn.in_proj_"):
                renamed[f"{place}self_attn.in_proj.{rest.removeprefix('attn.in_proj_')}"] = tensor
            else:
                stem, _, kind = rest.rpartition(".")
                renamed[f"{place}{_OPEN_CLIP_BLOCK[stem]}.{kind}"] = tensor
    return renamed


_OPEN_CLIP_ENDS = {
    "token_embedding.weight": "embeddings.token_embedding.weight",
    "positional_embedding": "embeddings.position_embedding.weight",
    "text_projection": "text_projection",
    "text_projection.weight": "text_projection",  # a layer's, which is turned already
    "ln_final.weight": "final_layer_norm.weight",
    "ln_final.bias": "final_layer_norm.bias",
}
_OPEN_CLIP_BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}


def _clip_names(block: str) -> dict[str, tuple[str, ...]]:
    """What the layers of a block are called by open_clip, and were by diffusers before 0.17."""
    attention = tuple(f"{block}.self_attn.{each}_proj" for each in "qkv")
    return {
        **{f"encoder.layers.N.self_attn.to_{each}": (f"{block}.self_attn.{each}_proj",) for each in "qkv"},
        "encoder.layers.N.self_attn.to_out": (f"{block}.self_attn.out_proj",),
        "transformer.resblocks.N.attn.in_proj": attention,
        **{
            f"transformer.resblocks.N.{theirs}": (f"{block}.{ours}",)
            for theirs, ours in _OPEN_CLIP_BLOCK.items()
        },
    }


def clip_tokenizer(folder: Path, text_encoder: Path, **options: Any) -> Tokenizer:
    """The tokenizer in ``folder``, of as many entries as the text encoder's configuration says."""
    config = read_json(text_encoder / "config.json")
    return Tokenizer("CLIPTokenizer", folder, config["vocab_size"], options)
