"""The shared noise is a good random function of its four numbers and of nothing else."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from cluster.speculation.coupling import coupled_pick, gumbel_noise

LEVEL = 1e-4  # of each statistical test here; the seeds are fixed


def noise(
    *, seeds: object = 0, choices: object = 0, positions: object = 0, token_ids: object
) -> torch.Tensor:
    """Noise for the broadcast rows of the arguments."""
    arrays = [torch.as_tensor(values, dtype=torch.int64) for values in (seeds, choices, positions)]
    rows = torch.broadcast_tensors(*[array.reshape(-1) for array in arrays])
    return gumbel_noise(
        seeds=rows[0],
        choice_indices=rows[1],
        positions=rows[2],
        token_ids=torch.as_tensor(token_ids, dtype=torch.int64),
    )


def uniforms(values: torch.Tensor) -> np.ndarray:
    return torch.exp(-torch.exp(-values)).numpy()


def test_values_do_not_depend_on_shape_or_neighbours() -> None:
    seeds = torch.arange(37) * 7919 - 11
    positions = torch.arange(37) % 5
    whole = noise(seeds=seeds, choices=3, positions=positions, token_ids=range(101))
    for row in (0, 17, 36):
        alone = noise(seeds=seeds[row], choices=3, positions=positions[row], token_ids=range(101))
        assert torch.allclose(whole[row], alone[0], rtol=1e-14, atol=1e-14)
        columns = torch.tensor([[100, 3, 50]])
        some = noise(seeds=seeds[row], choices=3, positions=positions[row], token_ids=columns)
        assert torch.allclose(whole[row, columns[0]], some[0], rtol=1e-14, atol=1e-14)


def test_values_are_those_of_splitmix64() -> None:
    """A second implementation, in Python's unbounded integers."""
    mask = (1 << 64) - 1

    def mix(word: int) -> int:
        word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & mask
        word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & mask
        return word ^ (word >> 31)

    gamma = 0x9E3779B97F4A7C15
    for seed, choice, position, token_id in [(0, 0, 0, 0), (-1, 2, 30, 4), (2**63 - 1, 15, 9, 7)]:
        word = mix((seed & mask) ^ 0xD1342543DE82EF95)
        for number in (choice, position, token_id + 1):
            word = mix((word + number * gamma) & mask)
        expected = -np.log(-np.log(((word >> 12) + 0.5) * 2.0**-52))
        value = noise(seeds=seed, choices=choice, positions=position, token_ids=[token_id]).item()
        assert value == pytest.approx(expected, rel=1e-13)


@pytest.mark.parametrize("axis", ["seeds", "choices", "positions", "token_ids"])
def test_uniform_and_serially_independent_along_every_argument(axis: str) -> None:
    counter = torch.arange(200_000)
    fixed = {"token_ids": [5], axis: counter}
    values = uniforms(noise(**fixed).flatten())
    assert stats.kstest(values, "uniform").pvalue > LEVEL
    for lag in (1, 2, 3):
        cells = np.floor(values * 16).astype(int)
        table = np.bincount(cells[:-lag] * 16 + cells[lag:], minlength=256).reshape(16, 16)
        assert stats.chisquare(table.ravel()).pvalue > LEVEL


def test_independent_across_neighbouring_arguments() -> None:
    """Pairs that a weak mixer would tie: the same sum, or one step in two arguments."""
    counter = torch.arange(100_000)
    base = uniforms(noise(seeds=counter, token_ids=[9]).flatten())
    neighbours = {
        "seed and choice": noise(seeds=counter - 1, choices=1, token_ids=[9]),
        "seed and position": noise(seeds=counter - 1, positions=1, token_ids=[9]),
        "choice and position": noise(seeds=counter, choices=1, positions=-1, token_ids=[9]),
        "position and token": noise(seeds=counter, positions=1, token_ids=[8]),
        "position": noise(seeds=counter, positions=1, token_ids=[9]),
        "token": noise(seeds=counter, token_ids=[10]),
        "sign of seed": noise(seeds=-counter, token_ids=[9])[1:],
    }
    for name, values in neighbours.items():
        other = uniforms(values.flatten())
        first = base[-len(other) :]
        table = np.histogram2d(first, other, bins=16, range=[[0, 1], [0, 1]])[0]
        assert stats.chisquare(table.ravel()).pvalue > LEVEL, name


def test_extreme_arguments_give_finite_noise() -> None:
    extremes = torch.tensor([-(2**63), -1, 0, 1, 2**63 - 1])
    values = noise(seeds=extremes, choices=15, positions=2**31, token_ids=range(1000))
    assert values.dtype == torch.float64
    assert torch.isfinite(values).all()
    assert len(values.unique()) == values.numel()


def test_pick_has_the_law_of_the_logprobs() -> None:
    probs = torch.tensor([0.5, 0.0, 0.3, 0.15, 0.05], dtype=torch.float64)
    values = noise(seeds=torch.arange(100_000), positions=7, token_ids=range(5))
    counts = torch.bincount(coupled_pick(probs.log(), values), minlength=5).numpy()
    assert counts[1] == 0
    kept = [0, 2, 3, 4]
    assert stats.chisquare(counts[kept], probs.numpy()[kept] * 100_000).pvalue > LEVEL


def test_pick_takes_the_lowest_index_on_a_tie() -> None:
    picks = coupled_pick(torch.zeros(2, 4), torch.tensor([[0.0, 2, 2, 1], [3, 3, 3, 3]]).double())
    assert picks.tolist() == [1, 0]


@pytest.mark.gpu
def test_device_and_host_pick_alike() -> None:
    seeds, positions = torch.arange(64), torch.arange(64) * 3
    arguments = {"seeds": seeds, "choice_indices": seeds * 0, "positions": positions}
    token_ids = torch.arange(32_000)
    host = gumbel_noise(**arguments, token_ids=token_ids)
    on_device = {name: values.cuda() for name, values in arguments.items()}
    device = gumbel_noise(**on_device, token_ids=token_ids.cuda()).cpu()
    assert torch.allclose(host, device, rtol=1e-14, atol=1e-14)
    assert torch.equal(host.argmax(1), device.argmax(1))
