"""
Gives torch's context parallelism an attention on CPU, for which it has no form: its own ring attention, over the kernel
of the CPU. What splits the sequences is all torch's. Import before a trainer is made.
"""

import functools

import torch
import torch.nn.functional as F
from torch.distributed.tensor.experimental._context_parallel import _attention


_local_attention = F.scaled_dot_product_attention
_SEQUENCE_DIM = 2


class RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, group, query, key, value, scale):
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        out, logsumexp = _attention._templated_ring_attention(
            group, _SEQUENCE_DIM, kernel, query, key, value, is_causal=True, dropout_p=0.0, scale=scale
        )
        ctx.save_for_backward(query, key, value, out, logsumexp)
        ctx.group, ctx.scale = group, scale
        return out

    @staticmethod
    def backward(ctx, grad_out):
        query, key, value, out, logsumexp = ctx.saved_tensors
        gradients = _attention._templated_ring_attention_backward(
            ctx.group,
            _SEQUENCE_DIM,
            torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default,
            grad_out,
            "grad_out",
            query,
            key,
            value,
            out,
            logsumexp,
            is_causal=True,
            dropout_p=0.0,
            scale=ctx.scale,
        )
        return None, *gradients[:3], None


def _attend(group, query, key, value, attn_mask=None, dropout_p=0.0, scale=None, is_causal=False, enable_gqa=False):
    assert is_causal and attn_mask is None and dropout_p == 0 and not enable_gqa
    return RingAttention.apply(group, query, key, value, scale)


def _enable(seq_dim, mesh):
    assert seq_dim == _SEQUENCE_DIM
    F.scaled_dot_product_attention = functools.partial(_attend, mesh.get_group())


def _disable():
    F.scaled_dot_product_attention = _local_attention


_attention._enable_context_parallel_dispatcher_impl = _enable
_attention._disable_context_parallel_dispatcher_impl = _disable
