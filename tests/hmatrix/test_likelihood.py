"""A likelihood that learns: gradients through factorizations against dense ones."""

import math

import numpy as np
import torch

import hmatrix as hm


def exponential_kernel(t, length, tree):
    """``exp(−|x − y| / length)`` of sorted points: every block has rank one, exactly."""
    grid = t.reshape(tree.nodes(tree.levels), -1)
    leaves = torch.exp(-abs(grid[:, :, None] - grid[:, None, :]) / length)
    upper = []
    for level in range(tree.levels):
        left, right = t.reshape(tree.nodes(level), 2, -1).unbind(1)
        middle = (left[:, -1:] + right[:, :1]) / 2
        U = torch.exp((left - middle) / length)[..., None]
        V = torch.exp((middle - right) / length)[..., None]
        upper.append(hm.LowRank(U, torch.ones(len(U), 1).double(), V))
    return hm.HODLR(tree, leaves, tuple(upper))


def negative_log_likelihood(t, y, length, noise, tree):
    H = exponential_kernel(t, length, tree)
    F = hm.factorize(hm.shift(H, noise * torch.ones_like(t)))
    return (y @ F.solve(y) + F.logdet() + len(t) * math.log(2 * math.pi)) / 2


def test_a_gaussian_process_learns_its_length_scale_and_noise():
    n, tree = 512, hm.ClusterTree(512, 4)
    rng = np.random.default_rng(0)
    t = torch.asarray(np.sort(rng.random(n)) * 20)
    truth = torch.exp(-abs(t[:, None] - t) / 0.7) + 0.05 * torch.eye(n)
    y = torch.linalg.cholesky(truth) @ torch.asarray(rng.standard_normal(n))

    def dense(length, noise):
        K = torch.exp(-abs(t[:, None] - t) / length) + noise * torch.eye(n).double()
        square = y @ torch.linalg.solve(K, y)
        return (square + torch.logdet(K) + n * math.log(2 * math.pi)) / 2

    logs = torch.log(torch.tensor([3.0, 1.0]).double()).requires_grad_()
    for function in (dense, lambda *a: negative_log_likelihood(t, y, *a, tree)):
        value = function(*torch.exp(logs))
        gradient = torch.autograd.grad(value, logs)[0]
        if function is dense:
            exact, exact_gradient = value, gradient
    torch.testing.assert_close(value, exact, rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient, exact_gradient, rtol=1e-8, atol=0)

    optimizer = torch.optim.LBFGS([logs], max_iter=40, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = negative_log_likelihood(t, y, *torch.exp(logs), tree)
        loss.backward()
        return loss

    optimizer.step(closure)
    length, noise = torch.exp(logs).tolist()
    assert 0.4 < length < 1.2
    assert 0.03 < noise < 0.08
    # a minimum of the dense likelihood
    final = torch.autograd.grad(dense(*torch.exp(logs)), logs)[0]
    assert torch.linalg.norm(final) < 1e-3 * torch.linalg.norm(exact_gradient)
