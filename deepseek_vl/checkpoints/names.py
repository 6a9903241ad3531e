"""The weights' names in two layouts: DeepSeek's own ("reference"), and that of transformers' `deepseek_vl` classes.

`NAMES` is the one table of them. Whatever reads or writes the other layout goes through `rename`.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from deepseek_vl.checkpoints.tensors import JoinedRows, Slice, divide_rows, shape_of

REFERENCE, TRANSFORMERS = "reference", "transformers"
LAYOUTS = (REFERENCE, TRANSFORMERS)
GGUF, GGUF_TYPES = "gguf", ("f16", "bf16", "q8_0", "q4_0")
"""llama.cpp's format and its types of weights. It is not in `LAYOUTS`: checkpoints are written in it, never loaded."""

NAMES = {
    # The reference's: transformers'. `*` is a layer's number, `@` is weight or bias, and capitals are one of `PLACES`.
    # Parts in brackets are several tensors, stacked by rows in the other layout; a part has a share for each letter.
    "SIGLIP.pos_embed": "SIGLIP.embeddings.position_embedding.weight",  # see `LEADING_AXIS`
    "SIGLIP.blocks.*.attn.qkv.@": "SIGLIP.encoder.layers.*.self_attn.[q,k,v]_proj.@",
    "SIGLIP.attn_pool.[q,kv].@": "SIGLIP.head.attention.in_proj_@",
    "SIGLIP.patch_embed.proj.@": "SIGLIP.embeddings.patch_embedding.@",
    "SIGLIP.blocks.*.norm1.@": "SIGLIP.encoder.layers.*.layer_norm1.@",
    "SIGLIP.blocks.*.attn.proj.@": "SIGLIP.encoder.layers.*.self_attn.out_proj.@",
    "SIGLIP.blocks.*.norm2.@": "SIGLIP.encoder.layers.*.layer_norm2.@",
    "SIGLIP.blocks.*.mlp.fc1.@": "SIGLIP.encoder.layers.*.mlp.fc1.@",
    "SIGLIP.blocks.*.mlp.fc2.@": "SIGLIP.encoder.layers.*.mlp.fc2.@",
    "SIGLIP.norm.@": "SIGLIP.post_layernorm.@",
    "SIGLIP.attn_pool.latent": "SIGLIP.head.probe",
    "SIGLIP.attn_pool.proj.@": "SIGLIP.head.attention.out_proj.@",
    "SIGLIP.attn_pool.norm.@": "SIGLIP.head.layernorm.@",
    "SIGLIP.attn_pool.mlp.fc1.@": "SIGLIP.head.mlp.fc1.@",
    "SIGLIP.attn_pool.mlp.fc2.@": "SIGLIP.head.mlp.fc2.@",
    # the projector of SigLIP alone
    "aligner.layers.0.@": "model.aligner.linear1.@",
    "aligner.layers.2.@": "model.aligner.linear2.@",
    # the hybrid's
    "SAM.pos_embed": "SAM.pos_embed",
    "SAM.patch_embed.proj.@": "SAM.patch_embed.projection.@",
    "SAM.blocks.*.norm1.@": "SAM.layers.*.layer_norm1.@",
    "SAM.blocks.*.attn.rel_pos_h": "SAM.layers.*.attn.rel_pos_h",
    "SAM.blocks.*.attn.rel_pos_w": "SAM.layers.*.attn.rel_pos_w",
    "SAM.blocks.*.attn.qkv.@": "SAM.layers.*.attn.qkv.@",
    "SAM.blocks.*.attn.proj.@": "SAM.layers.*.attn.proj.@",
    "SAM.blocks.*.norm2.@": "SAM.layers.*.layer_norm2.@",
    "SAM.blocks.*.mlp.lin1.@": "SAM.layers.*.mlp.lin1.@",
    "SAM.blocks.*.mlp.lin2.@": "SAM.layers.*.mlp.lin2.@",
    "SAM.neck.0.@": "SAM.neck.conv1.@",
    "SAM.neck.1.@": "SAM.neck.layer_norm1.@",
    "SAM.neck.2.@": "SAM.neck.conv2.@",
    "SAM.neck.3.@": "SAM.neck.layer_norm2.@",
    "SAM.neck_hd.0.@": "model.high_res_vision_neck.conv1.@",
    "SAM.neck_hd.1.@": "model.high_res_vision_neck.layer_norm1.@",
    "SAM.neck_hd.2.@": "model.high_res_vision_neck.conv2.@",
    "SAM.neck_hd.3.@": "model.high_res_vision_neck.layer_norm2.@",
    "SAM.hd_alpha_downsamples": "model.high_res_vision_alpha",
    "SAM.downsamples.0.@": "model.high_res_vision_proj.conv1.@",
    "SAM.downsamples.1.@": "model.high_res_vision_proj.conv2.@",
    "aligner.high_up_proj.@": "model.aligner.high_res_vision_proj.@",
    "aligner.low_up_proj.@": "model.aligner.vision_proj.@",
    "aligner.layers.1.@": "model.aligner.proj.@",
    # the language model
    "LLAMA.embed_tokens.weight": "LLAMA.embed_tokens.weight",
    "LLAMA.norm.weight": "LLAMA.norm.weight",
    "language_model.lm_head.weight": "lm_head.weight",
    "LLAMA.layers.*.self_attn.q_proj.weight": "LLAMA.layers.*.self_attn.q_proj.weight",
    "LLAMA.layers.*.self_attn.k_proj.weight": "LLAMA.layers.*.self_attn.k_proj.weight",
    "LLAMA.layers.*.self_attn.v_proj.weight": "LLAMA.layers.*.self_attn.v_proj.weight",
    "LLAMA.layers.*.self_attn.o_proj.weight": "LLAMA.layers.*.self_attn.o_proj.weight",
    "LLAMA.layers.*.mlp.gate_proj.weight": "LLAMA.layers.*.mlp.gate_proj.weight",
    "LLAMA.layers.*.mlp.up_proj.weight": "LLAMA.layers.*.mlp.up_proj.weight",
    "LLAMA.layers.*.mlp.down_proj.weight": "LLAMA.layers.*.mlp.down_proj.weight",
    "LLAMA.layers.*.input_layernorm.weight": "LLAMA.layers.*.input_layernorm.weight",
    "LLAMA.layers.*.post_attention_layernorm.weight": "LLAMA.layers.*.post_attention_layernorm.weight",
}
"""The names of all weights but `UNUSED`: the reference's -> transformers'."""

PLACES = {
    REFERENCE: {
        "SIGLIP": ("vision_model.vision_tower", "vision_model.vision_tower_low.vision_tower"),  # alone, in the hybrid
        "SAM": ("vision_model.vision_tower_high.vision_tower",),
        "LLAMA": ("language_model.model",),
    },
    TRANSFORMERS: {
        # All versions read the first; newer ones write the second.
        "SIGLIP": ("model.vision_model.vision_model", "model.vision_model"),
        "SAM": ("model.high_res_vision_model.vision_encoder",),
        "LLAMA": ("model.language_model",),
    },
}
"""The prefixes of the model's parts in each layout; any of them is read."""

LEADING_AXIS = "SIGLIP.pos_embed"
"""The weight that has a leading axis of length 1 in the reference, and lacks it in transformers."""

UNUSED = tuple(f"vision_model.{tower}_layer_norm.{name}" for tower in ("high", "low") for name in ("weight", "bias"))
"""Weights of the hybrid tower that no forward pass uses, and that transformers' layout has no place for."""


def layout_of(names: Iterable[str]) -> str:
    """Which layout weights of these names are in."""
    is_reference = any(name.startswith(("language_model.", "vision_model.", "aligner.")) for name in names)
    return REFERENCE if is_reference else TRANSFORMERS


def other_layout(layout: str) -> str:
    """The other of the two layouts."""
    return next(other for other in LAYOUTS if other != layout)


def rename(tensors: Mapping[str, Slice], layout: str) -> tuple[dict[str, Slice], list[str]]:
    """Convert the tensors of a checkpoint from the other layout to `layout`, without reading any.

    Args:
        tensors: by name.
        layout: the wanted one.

    Returns:
        The tensors that `layout` has, and the names of those it has no place for.
    """
    places = {place: where[0] for place, where in PLACES[layout].items()}
    if layout == REFERENCE and any("high_res" in name for name in tensors):
        places["SIGLIP"] = PLACES[layout]["SIGLIP"][1]
    renamed: dict[str, Slice] = {}
    used: set[str] = set()
    for row in NAMES.items():
        source, target = row if layout == TRANSFORMERS else row[::-1]
        parts, pattern = _parts(source), _pattern(source, PLACES[other_layout(layout)])
        found: dict[tuple[str, str], dict[str, str]] = {}  # (layer, weight or bias) -> part -> name
        for match in filter(None, map(pattern.fullmatch, tensors)):
            layer, kind, part = (match.groupdict().get(name, "") for name in ("layer", "kind", "part"))
            found.setdefault((layer, kind), {})[part] = match[0]
        for (layer, kind), names in found.items():
            if len(names) < len(parts):
                continue
            whole = [tensors[names[part]] for part in parts]
            if LEADING_AXIS in row:
                shape = shape_of(whole[0])
                divided = [JoinedRows([(whole[0], slice(None))], [1, *shape] if layout == REFERENCE else shape[1:])]
            else:
                divided = divide_rows(whole, [len(part) or 1 for part in _parts(target)])
            filled = _PLACE.sub(lambda match: places[match[0]], target.replace("*", layer).replace("@", kind))
            renamed.update(zip((_BRACKETS.sub(part, filled) for part in _parts(target)), divided, strict=True))
            used.update(names.values())
    return renamed, [name for name in tensors if name not in used]


def as_reference(tensors: Mapping[str, Any], model: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """A checkpoint's tensors, from either layout, in the reference's; unknown ones are kept as they are.

    Args:
        tensors: by name.
        model: the weights of the model that they are for, under the reference's names.
    """
    if layout_of(tensors) == REFERENCE:
        return dict(tensors)
    renamed, not_known = rename(tensors, REFERENCE)
    return {**renamed, **{name: tensors[name] for name in not_known}, **unused_weights(model, torch.float32)}


def unused_weights(model: Mapping[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Layer norms that change nothing, for the weights of `UNUSED` that a file in transformers' layout lacks.

    Args:
        model: the model's weights; only names and shapes are used.
        dtype: of the result.
    """
    return {
        name: torch.full(model[name].shape, float(name.endswith("weight")), dtype=dtype, device="cpu")
        for name in UNUSED
        if name in model
    }


_PLACE, _BRACKETS = re.compile("^[A-Z]+"), re.compile(r"\[(.+)\]")


def _parts(name: str) -> list[str]:
    """The parts in a name's brackets: q and kv for `x.[q,kv].y`; one empty part without brackets."""
    brackets = _BRACKETS.search(name)
    return brackets[1].split(",") if brackets else [""]


def _pattern(name: str, places: Mapping[str, tuple[str, ...]]) -> re.Pattern[str]:
    """The regular expression of the weight names that a name in the table stands for."""

    def of(match: re.Match[str]) -> str:
        if match[0] == "*":
            return r"(?P<layer>\d+)"
        if match[0] == "@":
            return "(?P<kind>weight|bias)"
        if match[0].startswith("["):
            return f"(?P<part>{'|'.join(_parts(name))})"
        return f"(?:{'|'.join(map(re.escape, places[match[0]]))})" if match[0] in places else re.escape(match[0])

    return re.compile(re.sub(r"^[A-Z]+|\[.+\]|[*@]|[^*@[]+", of, name))
