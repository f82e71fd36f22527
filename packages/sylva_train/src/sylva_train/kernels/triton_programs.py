"""The fused optimizer's programs, in Triton's language; `triton_adamw` launches them."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["adamw_kernel", "prepare_kernel", "square_kernel"]


@triton.jit
def bfloat16_bits(x):
    """Round float32 to the nearest bfloat16, ties to even, as an integer."""
    bits = x.to(tl.uint32, bitcast=True)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    is_number = x == x  # noqa: PLR0124 - as NaN is not; rounded, it might become 0
    return tl.where(is_number, rounded, 0x7FC0).to(tl.uint16)


@triton.jit(do_not_specialize=["layers"])
def prepare_kernel(
    steps_ptr,
    group_ptr,
    gradients_ptr,
    options_ptr,
    factor_ptr,
    found_inf_ptr,
    scalars_ptr,
    layers,
    LAYERS: tl.constexpr,
    SCALARS: tl.constexpr,
):
    """Count the steps of layers that take one, and work out their numbers."""
    layer = tl.program_id(0) * LAYERS + tl.arange(0, LAYERS)
    inside = layer < layers
    gradient = tl.load(gradients_ptr + layer, mask=inside, other=0)
    active = tl.where(tl.load(found_inf_ptr) == 0, gradient, 0) != 0
    step = tl.load(steps_ptr + layer, mask=inside, other=0.0)
    step += active.to(tl.float32)
    tl.store(steps_ptr + layer, step, mask=inside)

    # In float64, as PyTorch does: 1 − β₂ has half of float32's digits, or fewer.
    option = options_ptr + 6 * tl.load(group_ptr + layer, mask=inside, other=0)
    lr, beta1, beta2 = tl.load(option), tl.load(option + 1), tl.load(option + 2)
    eps, decay, sign = tl.load(option + 3), tl.load(option + 4), tl.load(option + 5)
    step = step.to(tl.float64)
    left1 = 1 - tl.exp(step * tl.log(tl.maximum(beta1, 1e-30)))
    left2 = 1 - tl.exp(step * tl.log(tl.maximum(beta2, 1e-30)))
    # A layer that takes no step may be at none, where nothing is left to divide by.
    left1 = tl.where(active, left1, 1.0)
    left2 = tl.where(active, left2, 1.0)
    scalar = scalars_ptr + SCALARS * layer
    tl.store(scalar, (lr * decay).to(tl.float32), mask=inside)
    tl.store(scalar + 1, (1 - beta1).to(tl.float32), mask=inside)
    tl.store(scalar + 2, beta2.to(tl.float32), mask=inside)
    tl.store(scalar + 3, (1 - beta2).to(tl.float32), mask=inside)
    tl.store(scalar + 4, (lr / left1).to(tl.float32), mask=inside)
    tl.store(scalar + 5, tl.sqrt(left2).to(tl.float32), mask=inside)
    tl.store(scalar + 6, eps.to(tl.float32), mask=inside)
    tl.store(scalar + 7, sign.to(tl.float32) * tl.load(factor_ptr), mask=inside)
    tl.store(scalar + 8, active.to(tl.float32), mask=inside)
    tl.store(scalar + 9, step.to(tl.float32), mask=inside)


@triton.jit
def typed(address, KIND: tl.constexpr, ALIGNED: tl.constexpr):
    """Make a pointer of a 64-bit address; wide loads need to know that it is aligned."""
    pointer = address.to(tl.pointer_type(KIND))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def load_weights(address, dtype, place, inside, ALIGNED: tl.constexpr):
    """Read weights whose dtype is known by its number alone, as float32."""
    # A name may not stand for pointers of different types in different branches.
    if dtype == 0:
        singles = typed(address, tl.float32, ALIGNED) + place
        weights = tl.load(singles, mask=inside, other=0.0)
    elif dtype == 1:
        # bfloat16 is the upper half of float32.
        uppers = typed(address, tl.uint16, ALIGNED) + place
        bits = tl.load(uppers, mask=inside, other=0).to(tl.uint32) << 16
        weights = bits.to(tl.float32, bitcast=True)
    else:
        halves = typed(address, tl.float16, ALIGNED) + place
        weights = tl.load(halves, mask=inside, other=0.0).to(tl.float32)
    return weights


@triton.jit
def store_weights(address, dtype, place, weights, inside, ALIGNED: tl.constexpr):
    """Write float32 into weights whose dtype is known by its number alone."""
    if dtype == 0:
        tl.store(typed(address, tl.float32, ALIGNED) + place, weights, mask=inside)
    elif dtype == 1:
        bits = bfloat16_bits(weights)
        tl.store(typed(address, tl.uint16, ALIGNED) + place, bits, mask=inside)
    else:
        half = weights.to(tl.float16)
        tl.store(typed(address, tl.float16, ALIGNED) + place, half, mask=inside)


@triton.jit
def noise(element, seed):
    """Return numbers in [0, 1), as `quantize.noise` does."""
    h = element.to(tl.uint32) * 0x9E3779B1 + seed.to(tl.uint32) * 0x85EBCA6B
    h = (h ^ (h >> 16)) * 0x7FEB352D
    h = (h ^ (h >> 15)) * 0x846CA68B
    return ((h ^ (h >> 16)) >> 8).to(tl.float32) * (1.0 / (1 << 24))


@triton.jit
def level(q, SIGNED: tl.constexpr):
    """Return the share of the scale that a code's magnitude stands for."""
    if SIGNED:
        share = q * (1.0 / 127)
        share = share * share
    else:
        share = q * (1.0 / 255)
        share = share * share
        share = share * share
    return share


@triton.jit
def round_to_level(share, random, SIGNED: tl.constexpr):
    """Round shares of the scale up or down to a code's magnitude, in proportion."""
    if SIGNED:
        low = tl.minimum(tl.floor(tl.sqrt(share) * 127), 126.0)
    else:
        low = tl.minimum(tl.floor(tl.sqrt(tl.sqrt(share)) * 255), 254.0)
    below = level(low, SIGNED)
    up = share - below > random * (level(low + 1, SIGNED) - below)
    return low + up.to(tl.float32)


@triton.jit
def adamw_kernel(
    table_ptr,
    owners_ptr,
    gradients_ptr,
    scalars_ptr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    TO_BASE: tl.constexpr,
    ALIGNED: tl.constexpr,
    LINES: tl.constexpr,
    FIELDS: tl.constexpr,
    SCALARS: tl.constexpr,
    EIGHT_BIT: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Update one stretch of one layer's values; see `adamw.adamw_` for the formulas.

    ``LINES``: rows of the weights are contiguous, and their length and start aligned.
    """
    program = tl.program_id(0)
    layer = tl.load(owners_ptr + program)
    row = table_ptr + FIELDS * layer
    scalar = scalars_ptr + SCALARS * layer
    if tl.load(scalar + 8) != 0:
        decay, rest1 = tl.load(scalar), tl.load(scalar + 1)
        beta2, rest2 = tl.load(scalar + 2), tl.load(scalar + 3)
        rate, left2 = tl.load(scalar + 4), tl.load(scalar + 5)
        eps, factor = tl.load(scalar + 6), tl.load(scalar + 7)

        first, size = tl.load(row + 6).to(tl.int32), tl.load(row + 7).to(tl.int32)
        if ALIGNED:
            size = tl.multiple_of(size, 16)
        # In rows of the values that share a scale, if moments have 8 bits.
        group = (program - first) * (CHUNK // GROUP) + tl.arange(0, CHUNK // GROUP)
        element = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
        live = element < size
        values = typed(tl.load(row), tl.float32, ALIGNED) + element
        gradient = tl.load(gradients_ptr + layer)
        gradient = typed(gradient, tl.float32, ALIGNED) + element
        weight_address, dtype = tl.load(row + 3), tl.load(row + 13)

        # The indices before anything is written, after which loads would have to wait.
        index = tl.load(row + 5).to(tl.pointer_type(tl.int32))
        if BLOCK > 0:  # noqa: SIM108 - one branch is compiled
            side = BLOCK
        else:
            side = tl.load(row + 8).to(tl.int32)
        if BLOCK > 0 and BLOCK * BLOCK % CHUNK == 0:
            # The stretch is a part of one block.
            block = (program - first) * CHUNK // (BLOCK * BLOCK)
            r, c = tl.load(index + 2 * block), tl.load(index + 2 * block + 1)
        else:
            block = element // (side * side)
            r = tl.load(index + 2 * block, mask=live, other=0)
            c = tl.load(index + 2 * block + 1, mask=live, other=0)
        height, width = tl.load(row + 9), tl.load(row + 10)
        row_stride, column_stride = tl.load(row + 11), tl.load(row + 12)

        g = tl.load(gradient, mask=live, other=0.0) * factor
        if EIGHT_BIT:
            full = group * GROUP < size
            m_codes = typed(tl.load(row + 1), tl.int8, ALIGNED) + element
            v_codes = typed(tl.load(row + 2), tl.uint8, ALIGNED) + element
            m_scales = typed(tl.load(row + 14), tl.float32, False) + group
            v_scales = typed(tl.load(row + 15), tl.float32, False) + group
            m_scale = tl.load(m_scales, mask=full, other=0.0)[:, None]
            v_scale = tl.load(v_scales, mask=full, other=0.0)[:, None]
            q = tl.load(m_codes, mask=live, other=0).to(tl.float32)
            m = level(q, True) * tl.where(q < 0, -m_scale, m_scale)
            q = tl.load(v_codes, mask=live, other=0).to(tl.float32)
            v = level(q, False) * v_scale
        else:
            exp_avg = typed(tl.load(row + 1), tl.float32, ALIGNED) + element
            exp_avg_sq = typed(tl.load(row + 2), tl.float32, ALIGNED) + element
            m = tl.load(exp_avg, mask=live, other=0.0)
            v = tl.load(exp_avg_sq, mask=live, other=0.0)
        w = tl.load(values, mask=live, other=0.0)
        m += (g - m) * rest1
        v = v * beta2 + g * g * rest2
        if TO_BASE:
            base = load_weights(tl.load(row + 4), dtype, element, live, ALIGNED)
            w -= (w - base) * decay
        else:
            w -= w * decay
        w -= rate * m / (tl.sqrt(v) / left2 + eps)
        if EIGHT_BIT:
            seed = 2 * tl.load(scalar + 9).to(tl.int32)
            m_most, v_most = tl.max(tl.abs(m), axis=1), tl.max(v, axis=1)
            tl.store(m_scales, m_most, mask=full)
            tl.store(v_scales, v_most, mask=full)
            m_share = tl.abs(m) / tl.maximum(m_most, 1.2e-38)[:, None]
            v_share = v / tl.maximum(v_most, 1.2e-38)[:, None]
            m_code = round_to_level(m_share, noise(element, seed), True)
            v_code = round_to_level(v_share, noise(element, seed + 1), False)
            v_code = tl.where(v > 0, tl.maximum(v_code, 1.0), v_code)
            m_code = tl.where(m < 0, -m_code, m_code)
            tl.store(m_codes, m_code.to(tl.int32).to(tl.int8), mask=live)
            tl.store(v_codes, v_code.to(tl.int32).to(tl.uint8), mask=live)
        else:
            tl.store(exp_avg, m, mask=live)
            tl.store(exp_avg_sq, v, mask=live)
        tl.store(values, w, mask=live)
        if LINES:
            width, row_stride = (
                tl.multiple_of(width, 16),
                tl.multiple_of(row_stride, 16),
            )
            column_stride = 1
        inner = element - block * (side * side)
        r = r.to(tl.int64) * side + inner // side
        c = c.to(tl.int64) * side + inner % side
        inside = live & (r < height) & (c < width)
        place = r * row_stride + c * column_stride
        store_weights(weight_address, dtype, place, w, inside, LINES)


@triton.jit
def square_kernel(
    table_ptr,
    owners_ptr,
    gradients_ptr,
    sums_ptr,
    CHUNK: tl.constexpr,
    ALIGNED: tl.constexpr,
    FIELDS: tl.constexpr,
):
    """Sum of the squares of one stretch of one layer's gradient: (programs,)."""
    program = tl.program_id(0)
    layer = tl.load(owners_ptr + program)
    row = table_ptr + FIELDS * layer
    address = tl.load(gradients_ptr + layer)
    first = tl.load(row + 6).to(tl.int32)
    size = tl.where(address != 0, tl.load(row + 7), 0).to(tl.int32)
    if ALIGNED:
        size = tl.multiple_of(size, 16)
    element = (program - first) * CHUNK + tl.arange(0, CHUNK)
    live = element < size
    g = tl.load(typed(address, tl.float32, ALIGNED) + element, mask=live, other=0.0)
    tl.store(sums_ptr + program, tl.sum(g * g))
