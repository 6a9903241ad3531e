"""The weights' names in two layouts: DeepSeek's own ("reference"), and that of transformers' `deepseek_vl` classes.

`GROUPS` is the one table of them. Whatever reads or writes the other layout goes through `rename`.
"""

import functools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

REFERENCE, TRANSFORMERS = "reference", "transformers"
LAYOUTS = (REFERENCE, TRANSFORMERS)


class Slice(Protocol):
    """A tensor that is read when it is indexed, as safetensors has them. A `torch.Tensor` may stand for one."""

    def get_shape(self) -> list[int]: ...

    def get_dtype(self) -> str: ...

    def __getitem__(self, index: Any) -> torch.Tensor: ...


def shape_of(tensor: Slice | torch.Tensor) -> list[int]:
    """A tensor's shape, read or not."""
    return list(tensor.shape if isinstance(tensor, torch.Tensor) else tensor.get_shape())


def dtype_of(tensor: Slice | torch.Tensor) -> torch.dtype:
    """A tensor's dtype, read or not."""
    return tensor.dtype if isinstance(tensor, torch.Tensor) else _DTYPES[tensor.get_dtype()]


DTYPE_NAMES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
}
_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


@dataclass(frozen=True)
class Group:
    """Weights that are the same numbers in both layouts.

    Attributes:
        reference, transformers: the tensors' names; `*` stands for a layer's number, `@` for `weight` or `bias`. Put
            together by rows, both sides are the same.
        shares: how the rows are divided among `reference`; those of `transformers` are equal parts.
        leading: the reference's tensor has one more axis in front, of length 1.
    """

    reference: tuple[str, ...]
    transformers: tuple[str, ...]
    shares: tuple[int, ...] = (1,)
    leading: bool = False

    def names(self, layout: str) -> tuple[str, ...]:
        """The tensors' names in a layout."""
        return self.reference if layout == REFERENCE else self.transformers

    def parts(self, layout: str) -> tuple[int, ...]:
        """How the rows are divided in a layout."""
        return self.shares if layout == REFERENCE else (1,) * len(self.transformers)


def _same(reference: str, transformers: str, pairs: Mapping[str, str]) -> list[Group]:
    """Groups of one tensor each, below two prefixes."""
    return [Group((reference + ours,), (transformers + theirs,)) for ours, theirs in pairs.items()]


def _siglip(reference: str, transformers: str) -> list[Group]:
    """The SigLIP tower: timm's fused projections are transformers' three, and the other way round in its head."""
    pool, head = f"{reference}attn_pool.", f"{transformers}head."
    return [
        Group((f"{reference}pos_embed",), (f"{transformers}embeddings.position_embedding.weight",), leading=True),
        Group(
            (f"{reference}blocks.*.attn.qkv.@",),
            tuple(f"{transformers}encoder.layers.*.self_attn.{name}_proj.@" for name in "qkv"),
        ),
        Group((f"{pool}q.@", f"{pool}kv.@"), (f"{head}attention.in_proj_@",), shares=(1, 2)),
        *_same(
            reference,
            transformers,
            {
                "patch_embed.proj.@": "embeddings.patch_embedding.@",
                "blocks.*.norm1.@": "encoder.layers.*.layer_norm1.@",
                "blocks.*.attn.proj.@": "encoder.layers.*.self_attn.out_proj.@",
                "blocks.*.norm2.@": "encoder.layers.*.layer_norm2.@",
                "blocks.*.mlp.fc1.@": "encoder.layers.*.mlp.fc1.@",
                "blocks.*.mlp.fc2.@": "encoder.layers.*.mlp.fc2.@",
                "norm.@": "post_layernorm.@",
            },
        ),
        *_same(
            pool,
            head,
            {
                "latent": "probe",
                "proj.@": "attention.out_proj.@",
                "norm.@": "layernorm.@",
                "mlp.fc1.@": "mlp.fc1.@",
                "mlp.fc2.@": "mlp.fc2.@",
            },
        ),
    ]


def _sam(reference: str, transformers: str) -> list[Group]:
    """The SAM tower with its second neck and its downsampling."""
    encoder = f"{transformers}high_res_vision_model.vision_encoder."
    neck = {"0.@": "conv1.@", "1.@": "layer_norm1.@", "2.@": "conv2.@", "3.@": "layer_norm2.@"}
    return [
        *_same(
            reference,
            encoder,
            {
                "pos_embed": "pos_embed",
                "patch_embed.proj.@": "patch_embed.projection.@",
                "blocks.*.norm1.@": "layers.*.layer_norm1.@",
                "blocks.*.attn.rel_pos_h": "layers.*.attn.rel_pos_h",
                "blocks.*.attn.rel_pos_w": "layers.*.attn.rel_pos_w",
                "blocks.*.attn.qkv.@": "layers.*.attn.qkv.@",
                "blocks.*.attn.proj.@": "layers.*.attn.proj.@",
                "blocks.*.norm2.@": "layers.*.layer_norm2.@",
                "blocks.*.mlp.lin1.@": "layers.*.mlp.lin1.@",
                "blocks.*.mlp.lin2.@": "layers.*.mlp.lin2.@",
            },
        ),
        *_same(f"{reference}neck.", f"{encoder}neck.", neck),
        *_same(f"{reference}neck_hd.", f"{transformers}high_res_vision_neck.", neck),
        *_same(
            reference,
            transformers,
            {
                "hd_alpha_downsamples": "high_res_vision_alpha",
                "downsamples.0.@": "high_res_vision_proj.conv1.@",
                "downsamples.1.@": "high_res_vision_proj.conv2.@",
            },
        ),
    ]


SIGLIP, FLAT_SIGLIP = "model.vision_model.vision_model.", "model.vision_model."
"""Where the tower is in transformers' layout, and where newer versions of transformers write it. All read the first."""

_LANGUAGE = {
    "language_model.model.embed_tokens.weight": "model.language_model.embed_tokens.weight",
    "language_model.model.norm.weight": "model.language_model.norm.weight",
    "language_model.lm_head.weight": "lm_head.weight",
    **{
        f"language_model.model.layers.*.{name}.weight": f"model.language_model.layers.*.{name}.weight"
        for name in (
            "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
            "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "input_layernorm", "post_attention_layernorm",
        )
    },
}  # fmt: skip

GROUPS = (
    # SigLIP alone, or beside SAM
    *_siglip("vision_model.vision_tower.", SIGLIP),
    *_same("aligner.layers.", "model.aligner.", {"0.@": "linear1.@", "2.@": "linear2.@"}),
    *_siglip("vision_model.vision_tower_low.vision_tower.", SIGLIP),
    *_sam("vision_model.vision_tower_high.vision_tower.", "model."),
    *_same(
        "aligner.",
        "model.aligner.",
        {"high_up_proj.@": "high_res_vision_proj.@", "low_up_proj.@": "vision_proj.@", "layers.1.@": "proj.@"},
    ),
    *_same("", "", _LANGUAGE),
)
"""All weights but `UNUSED`."""

UNUSED = tuple(f"vision_model.{tower}_layer_norm.{name}" for tower in ("high", "low") for name in ("weight", "bias"))
"""Weights of the hybrid tower that no forward pass uses, and that transformers' layout has no place for."""


class JoinedRows:
    """A tensor made of rows of others, which are read when it is indexed.

    Args:
        rows: tensors and which of their rows, one below the other.
        shape: of the result.
    """

    def __init__(self, rows: list[tuple[Slice, slice]], shape: list[int]):
        self._rows = rows
        self._shape = shape

    def get_shape(self) -> list[int]:
        """The shape."""
        return self._shape

    def get_dtype(self) -> str:
        """The dtype as safetensors writes it: `F16`."""
        dtypes = (dtype_of(tensor) for tensor, _ in self._rows)
        return DTYPE_NAMES[functools.reduce(torch.promote_types, dtypes)]

    def __getitem__(self, index: Any) -> torch.Tensor:
        parts = [tensor[rows] for tensor, rows in self._rows]
        whole = parts[0] if len(parts) == 1 else torch.cat(parts)
        return whole.reshape(self._shape)[index]


def layout_of(names: Iterable[str]) -> str:
    """Which layout weights of these names are in."""
    is_reference = any(name.startswith(("language_model.", "vision_model.", "aligner.")) for name in names)
    return REFERENCE if is_reference else TRANSFORMERS


def canonical(tensors: Mapping[str, Slice]) -> dict[str, Slice]:
    """Tensors of either layout, the tower's under the names that every version of transformers reads."""
    flat = re.compile("^" + re.escape(FLAT_SIGLIP) + r"(?=embeddings|encoder|post_layernorm|head)")
    return {flat.sub(SIGLIP, name): tensor for name, tensor in tensors.items()}


def rename(tensors: Mapping[str, Slice], layout: str) -> tuple[dict[str, Slice], list[str]]:
    """A checkpoint's tensors, which are in the other layout, as `layout` has them, without reading any.

    Args:
        tensors: by their `canonical` names.
        layout: the wanted one.

    Returns:
        The tensors that `layout` has, and the names of those it has no place for.
    """
    other = TRANSFORMERS if layout == REFERENCE else REFERENCE
    is_hybrid = any("high_res" in name or "vision_tower_high" in name for name in tensors)
    renamed: dict[str, Slice] = {}
    used: set[str] = set()
    for group in GROUPS:
        if _is_of_hybrid(group) not in (is_hybrid, None):
            continue
        sources, targets = group.names(other), group.names(layout)
        pattern = re.compile(
            re.escape(sources[0]).replace(r"\*", r"(?P<number>\d+)").replace("@", "(?P<kind>weight|bias)")
        )
        for match in filter(None, map(pattern.fullmatch, tensors)):
            fill = match.groupdict()
            found = [_filled(name, fill) for name in sources]
            if all(name in tensors for name in found):
                joined = _divide([tensors[name] for name in found], group, layout)
                renamed.update(zip((_filled(name, fill) for name in targets), joined, strict=True))
                used.update(found)
    return renamed, [name for name in tensors if name not in used]


def as_reference(tensors: Mapping[str, Slice], model: Mapping[str, torch.Tensor]) -> dict[str, Slice | torch.Tensor]:
    """A checkpoint's tensors, in whichever layout, as the reference has them; those it does not know as they are.

    Args:
        tensors: by their `canonical` names.
        model: the weights of the model that they are for, under the reference's names.
    """
    if layout_of(tensors) == REFERENCE:
        return dict(tensors)
    renamed, not_known = rename(tensors, REFERENCE)
    return {**renamed, **{name: tensors[name] for name in not_known}, **unused_weights(model, torch.float32)}


def unused_weights(model: Mapping[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """What stands for those of `UNUSED` that a model in the reference's layout has, in a file without them: a layer
    norm that changes nothing.

    Args:
        model: the model's weights, whatever they are yet.
        dtype: of the result.
    """
    return {
        name: torch.full(model[name].shape, float(name.endswith("weight")), dtype=dtype, device="cpu")
        for name in UNUSED
        if name in model
    }


def _is_of_hybrid(group: Group) -> bool | None:
    """Whether a group is of the hybrid architecture; None if it is of both."""
    name = group.reference[0]
    if name.startswith("language_model."):
        return None
    return name.startswith(("vision_model.vision_tower_", "aligner.high", "aligner.low", "aligner.layers.1"))


def _filled(name: str, fill: Mapping[str, str]) -> str:
    return name.replace("*", fill.get("number", "*")).replace("@", fill.get("kind", "@"))


def _divide(sources: list[Slice], group: Group, layout: str) -> list[Slice]:
    """The rows of some tensors as a group's tensors in `layout`."""
    shapes = [shape_of(source) for source in sources]
    if group.leading:
        shape = [1, *shapes[0]] if layout == REFERENCE else shapes[0][1:]
        return [JoinedRows([(sources[0], slice(None))], shape)]
    total, parts = sum(shape[0] for shape in shapes), group.parts(layout)
    targets: list[Slice] = []
    begin = 0
    for part in parts:
        end = begin + total * part // sum(parts)
        rows, first = [], 0
        for source, shape in zip(sources, shapes, strict=True):
            start, stop = max(begin, first), min(end, first + shape[0])
            if start < stop:
                rows.append((source, slice(start - first, stop - first)))
            first += shape[0]
        targets.append(JoinedRows(rows, [end - begin, *shapes[0][1:]]))
        begin = end
    return targets
