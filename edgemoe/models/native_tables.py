"""The weights of a model as the tables that the core reads. Floor 2.

The tables point into the weights, whose owner must keep them.
"""

import ctypes
from collections.abc import Sequence

import numpy as np

from ..runtime import core_decoder
from ..runtime.kernels import PackedMatrix
from ..runtime.records import RecordTable
from .args import QK_NORMS, ModelArgs
from .trunk import Fp32Matrix, LayerWeights, Linear, Rows


def model_table(
    args: ModelArgs,
    layers: Sequence[LayerWeights],
    embed: PackedMatrix,
    norm: np.ndarray,
    lm_head: Linear,
    records: RecordTable,
) -> core_decoder.Model:
    """em_model of all layers, whose experts are these records."""
    tables = (core_decoder.Block * args.num_layers)()
    for number, (table, weights) in enumerate(zip(tables, layers, strict=True)):
        for name in ("input_norm", "post_norm", "qkv_bias", "q_norm", "k_norm", "output_bias"):
            setattr(table, name, _address(getattr(weights, name)))
        for name in ("output", "router", "down", "shared_weight"):
            setattr(table, name, _matrix(getattr(weights, name)))
        for name, places in (("qkv", table.qkv), ("gate_up", table.gate_up)):
            matrix = getattr(weights, name)
            parts = matrix.parts if isinstance(matrix, Rows) else [matrix]
            for place, part in enumerate(parts):
                places[place] = _matrix(part)
        table.window = args.window[number]
        table.experts_of_token = _address(weights.experts_of_token)
        if weights.router is not None:
            table.first_key = records.first_key[number]
            table.first_stand_in = records.first_stand_in.get(number, 0)
            table.expert_width = records.width[number]
    return core_decoder.Model(
        num_layers=args.num_layers,
        hidden=args.hidden,
        num_heads=args.num_heads,
        num_kv_heads=args.num_kv_heads,
        head_dim=args.head_dim,
        rotary_dim=args.rope.rotary_dim,
        top_k=args.top_k,
        qk_norm=QK_NORMS.index(args.qk_norm),
        renormalise=args.norm_topk,
        rms_eps=args.rms_eps,
        clip=args.clip_qkv or 0.0,
        embedding=_matrix(embed),
        lm_head=_matrix(lm_head),
        norm=_address(norm),
        layers=tables,
    )


def _address(vector: np.ndarray | None) -> int | None:
    return None if vector is None else vector.ctypes.data


def _matrix(matrix: Linear | None) -> core_decoder.Matrix:
    if matrix is None:
        return core_decoder.Matrix()
    parts = matrix.parts if isinstance(matrix, Fp32Matrix) else [matrix]
    return core_decoder.Matrix(
        rows=matrix.rows,
        cols=matrix.cols,
        format=core_decoder.Format.of(parts[0].spec),
        num_parts=len(parts),
        packed=(ctypes.c_void_p * 3)(*(part.data.ctypes.data for part in parts)),
    )
