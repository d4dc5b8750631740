"""`SparseAdamW`: steps that are AdamW's bit for bit, and state that follows places which are dropped and grown."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from peft_kernels.formats.sparse_delta import prepare
from peft_kernels.optim import SparseAdamW

SHAPE = (4, 8)


def places(*flat: int):
    return prepare(torch.tensor(flat, dtype=torch.int64), SHAPE)[0]


@pytest.mark.parametrize("options", [{}, {"foreach": True}, {"capturable": False, "amsgrad": True}], ids=str)
def test_steps_are_those_of_adamw(options):
    """Over the values of 11 chosen weights as over a dense parameter, of which the others have gradient 0."""
    flat = torch.arange(0, 32, 3)
    values, dense = nn.Parameter(torch.randn(11)), nn.Parameter(torch.zeros(32))
    dense.data[flat] = values.data
    ours = SparseAdamW([values], lr=0.1, weight_decay=0.05, **options)
    theirs = torch.optim.AdamW([dense], lr=0.1, weight_decay=0.05, **options)
    for _ in range(5):
        values.grad = torch.randn(11)
        dense.grad = torch.zeros(32).index_copy(0, flat, values.grad)
        ours.step()
        theirs.step()
    assert torch.equal(values, dense[flat])
    assert sum(state.numel() for state in ours.state[values].values()) <= 3 * 11 + 1


def test_remap_keeps_the_state_of_places_that_stay():
    """Dropping and growing, then more steps: places that stay go on as if nothing had happened, bit for bit."""
    old, new = places(1, 5, 9, 30), places(5, 7, 30)
    kept, undisturbed = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4))
    ours, reference = (
        SparseAdamW([{"params": [kept], "lr": 0.1}]),
        torch.optim.AdamW([undisturbed], 0.1, weight_decay=0),
    )
    gradients = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    for gradient in gradients[:3]:
        kept.grad, undisturbed.grad = gradient.clone(), gradient.clone()
        ours.step()
        reference.step()
    grown = nn.Parameter(torch.cat((kept.data[1:2], torch.zeros(1), kept.data[3:])))
    ours.remap(kept, grown, old, new)
    assert kept not in ours.state
    assert ours.state[grown]["exp_avg"][1] == 0
    for gradient in gradients[3:]:
        grown.grad, undisturbed.grad = torch.stack((gradient[1], torch.tensor(0.5), gradient[3])), gradient.clone()
        ours.step()
        reference.step()
    assert torch.equal(grown[[0, 2]], undisturbed[[1, 3]])
    assert grown[1] < 0
    loaded = SparseAdamW([nn.Parameter(grown.detach().clone())])
    loaded.load_state_dict(ours.state_dict())


def test_remap_before_the_first_step_and_refusals():
    old, new = places(1, 5), places(2)
    first, second, other = (nn.Parameter(torch.zeros(count)) for count in (2, 1, 2))
    optimizer = SparseAdamW([first, other])
    with pytest.raises(ValueError, match="old is no parameter"):
        optimizer.remap(second, second, old, new)
    with pytest.raises(ValueError, match="already"):
        optimizer.remap(first, other, old, old)
    with pytest.raises(ValueError, match=r"new has shape \(2,\)"):
        optimizer.remap(first, nn.Parameter(torch.zeros(2)), old, new)
    optimizer.remap(first, second, old, new)
    assert optimizer.param_groups[0]["params"][0] is second
    second.grad = torch.ones(1)
    optimizer.step()
    assert second.item() != 0
