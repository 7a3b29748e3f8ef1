"""Masked convolution (1601.06759, section 3.4): only rows up to the centre, optionally of the ReLU of its input.

Legend: b batch · h w rows, columns · k input features · f output features · r reach: the kernel is (2r + 1)².

    out(i, j) = bias + Σ_{di = 0…r} Σ_{dj = −r…r} weight[:, :, di, r + dj] · act(u(i − r + di, j + dj))

with zeros outside the image and act the identity or ReLU. The weight arrives masked: what it may see in the centre row
is the caller's matter; the rows below the centre, all masked, are not there at all. Channels are last.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def masked_conv_reference(u: Tensor, weight: Tensor, bias: Tensor, relu: bool = False, extra: int = 0) -> Tensor:
    """The same as `masked_conv`, as a dense convolution with the rows below the centre set to zero: the oracle."""
    r = weight.shape[2] - 1
    u = F.pad(u.relu() if relu else u, (0, 0, 0, extra)).permute(0, 3, 1, 2)
    return F.conv2d(u, F.pad(weight, (0, 0, 0, r)), bias, padding=r).permute(0, 2, 3, 1)


def channels_first(u: Tensor) -> Tensor:
    """(b h w k) → a view (b k h w), whose memory is what torch calls channels last."""
    return u.permute(0, 3, 1, 2)


def channels_last(u: Tensor) -> Tensor:
    """(b k h w) → (b h w k), a view of memory that is channels last already."""
    return u.permute(0, 2, 3, 1)


class MaskedConv(torch.autograd.Function):
    """The torch form. Both gradients are convolutions of padded maps too, so nothing ever leaves channels last."""

    @staticmethod
    @torch.amp.custom_fwd(device_type="cuda", cast_inputs=torch.bfloat16)
    def forward(ctx, u, weight, bias, relu, extra):
        b, h, w, k = u.shape
        r = weight.shape[2] - 1
        padded = u.new_zeros(b, h + r, w + 2 * r + extra, k)
        inside = padded[:, r:, r : r + w]
        _ = torch.clamp_min(u, 0, out=inside) if relu else inside.copy_(u)
        ctx.save_for_backward(padded, weight)
        ctx.relu, ctx.extra = relu, extra
        return channels_last(F.conv2d(channels_first(padded), weight, bias))

    @staticmethod
    @torch.amp.custom_bwd(device_type="cuda")
    @once_differentiable
    def backward(ctx, d_out):
        padded, weight = ctx.saved_tensors
        r, d_u, d_weight, d_bias = weight.shape[2] - 1, None, None, None
        if ctx.needs_input_grad[0]:
            # u(i, j) is seen from rows i … i + r, with the kernel turned by half a turn.
            around = F.pad(d_out, (0, 0, r, r - ctx.extra, 0, r))
            turned = weight.transpose(0, 1).flip(2, 3).contiguous(memory_format=torch.channels_last)
            d_u = channels_last(F.conv2d(channels_first(around), turned))
            if ctx.relu:
                inside = padded[:, r:, r : r + d_u.shape[2]]
                d_u = torch.ops.aten.threshold_backward(d_u, inside, 0)
        if ctx.needs_input_grad[1]:
            stride, none, dilation = [1, 1], [0, 0], [1, 1]
            arguments = channels_first(d_out), channels_first(padded), weight, None, stride, none, dilation
            wanted = [False, True, False]  # its sum for the bias takes as long as the weight's gradient
            _, d_weight, _ = torch.ops.aten.convolution_backward(*arguments, False, none, 1, wanted)
        if ctx.needs_input_grad[2]:
            d_bias = d_out.flatten(0, 2).sum(0)
        return d_u, d_weight, d_bias, None, None


def masked_conv(u: Tensor, weight: Tensor, bias: Tensor, relu: bool = False, extra: int = 0) -> Tensor:
    """Convolve with the rows of a masked kernel up to its centre.

    Args:
        u: features (b h w k).
        weight: (f k r+1 2r+1), masked by the caller; its last row is the kernel's centre row.
        bias: (f).
        relu: whether u passes through a ReLU first.
        extra: columns more than u has, at most r, at the right end, where the centre stands outside the image.

    Returns:
        (b h w+extra f).

    Source: 1601.06759, section 3.4.
    """
    return MaskedConv.apply(u, weight, bias, relu, extra)
