"""Two processes (gloo) against one on the joined batch, through the very step that trains."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from mio_export.errors import UsageError
from mio_export.models import build_encoder
from mio_export.preprocess import Preprocess
from mio_export.train.loader import EpochBatches
from mio_export.train.module import SelfSupervised
from mio_export.train.objectives.registry import OBJECTIVES
from mio_export.train.recipe import recipe_from_dict

DIM, SIDE = 12, 8
EQUAL, RAGGED = (5, 5), (6, 3)
WEIGHTED = ("mio", "minc", "spectral")
CASES = [(name, EQUAL) for name in OBJECTIVES] + [(name, RAGGED) for name in WEIGHTED]


class Step(nn.Module):
    """What DistributedDataParallel wraps: the comparison of two views, without drawing any."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, view_0, view_1):
        return self.module.compare(view_0, view_1)


def build(objective):
    """The module of an objective in float64, encoder and heads free of batch norm; the target apart from the online."""
    torch.manual_seed(0)
    recipe = recipe_from_dict({"objective": objective, "output_dim": DIM, "hidden_dim": 16})
    encoder = build_encoder("small", Preprocess(image_size=SIDE, channels=1, mean=(0.5,), std=(0.25,)), stem="small")
    encoder.backbone = nn.Sequential(nn.Flatten(), nn.Linear(SIDE * SIDE, encoder.spec.embedding_dim), nn.Tanh())
    module = SelfSupervised(encoder, recipe, num_batches=1)
    branches = [module.online] if module.target is None else [module.online, module.target]
    for branch in branches:
        branch.head = nn.Sequential(nn.Linear(encoder.spec.embedding_dim, 16), nn.Tanh(), nn.Linear(16, DIM))
    if OBJECTIVES[objective].predictor == "mlp":
        module.predictor = nn.Sequential(nn.Linear(DIM, 16), nn.Tanh(), nn.Linear(16, DIM))
    if module.target is not None:
        module.target.requires_grad_(False)
    return module.double()


def views(num_images):
    generator = torch.Generator().manual_seed(1)
    return [255 * torch.rand(num_images, 1, SIDE, SIDE, dtype=torch.float64, generator=generator) for _ in range(2)]


def gradients(step, *pair, num_steps=2):
    """The loss and the gradients of the last of two steps on the same views: the second sees a Λ that has a past."""
    for _ in range(num_steps):
        step.zero_grad()
        loss = step(*pair)
        loss.backward()
    named = {name.replace("module.", ""): p.grad for name, p in step.named_parameters() if p.grad is not None}
    return loss.detach(), named


class Traffic(TorchDispatchMode):
    """Counts what the processes send to each other while the loss is computed."""

    def __init__(self):
        super().__init__()
        self.sent = []

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        if function.namespace == "c10d":
            name = function.name().removeprefix("c10d::")
            tensors = arguments[0] if name.startswith("allreduce") else arguments[1]
            self.sent.append((name, sum(tensor.numel() for tensor in tensors)))
        return function(*arguments, **(named or {}))


def work(rank, folder):
    """One of the two processes: every case one after another, results stored for the tests to look at."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    for objective, sizes in CASES:
        module = build(objective)
        start = sum(sizes[:rank])
        mine = [view[start : start + sizes[rank]] for view in views(sum(sizes))]
        loss, grads = gradients(DistributedDataParallel(Step(module)), *mine)
        with Traffic() as traffic:
            module.compare(*mine)
        moment = getattr(module.objective, "second_moment", None)
        result = {"loss": loss, "gradients": grads, "moment": moment, "sent": traffic.sent}
        torch.save(result, folder / f"{objective}-{sizes}-{rank}.pt")
    refusals = {}
    for objective in set(OBJECTIVES) - set(WEIGHTED):
        mine = [view[: RAGGED[rank]] for view in views(max(RAGGED))]
        try:
            build(objective).compare(*mine)
        except UsageError as error:
            refusals[objective] = str(error)
    torch.save(refusals, folder / f"refusals-{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gloo")
    torch.multiprocessing.spawn(work, (folder,), nprocs=2)
    return folder


def results(folder, objective, sizes):
    return [torch.load(folder / f"{objective}-{sizes}-{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize(("objective", "sizes"), CASES)
def test_two_processes_give_the_gradients_of_one_on_the_joined_batch(two_processes, objective, sizes):
    loss, expected = gradients(Step(build(objective)), *views(sum(sizes)))
    first, second = results(two_processes, objective, sizes)
    assert expected.keys() == first["gradients"].keys()
    for name, gradient in expected.items():
        assert gradient.norm() > 0, name
        for found in (first, second):
            error = (found["gradients"][name] - gradient).norm() / gradient.norm()
            assert error < 1e-6, (name, error)
    torch.testing.assert_close((first["loss"] + second["loss"]) / 2, loss, rtol=1e-9, atol=0)


@pytest.mark.parametrize("sizes", [EQUAL, RAGGED])
def test_the_second_moment_is_the_same_on_both_and_that_of_the_joined_batch(two_processes, sizes):
    module = build("minc")
    pair = views(sum(sizes))
    gradients(Step(module), *pair)
    module.compare(*pair)
    first, second = results(two_processes, "minc", sizes)
    assert torch.equal(first["moment"], second["moment"])
    torch.testing.assert_close(first["moment"], module.objective.second_moment, rtol=1e-9, atol=1e-12)


def test_minc_exchanges_its_second_moment_and_no_features(two_processes):
    for result in results(two_processes, "minc", EQUAL):
        assert [(name, n) for name, n in result["sent"] if n > 1] == [("allreduce_", DIM * DIM)]
        assert sum(n for _, n in result["sent"]) == DIM * DIM + 1  # and how many images it has


def test_the_others_gather_features(two_processes):
    for objective in ("mio", "spectral", "simclr"):
        (result, _) = results(two_processes, objective, EQUAL)
        assert any(n >= EQUAL[0] * DIM for _, n in result["sent"]), objective


@pytest.mark.parametrize("objective", sorted(set(OBJECTIVES) - set(WEIGHTED)))
def test_a_ragged_step_is_refused_where_it_would_be_weighed_wrongly(two_processes, objective):
    for rank in range(2):
        refusal = torch.load(two_processes / f"refusals-{rank}.pt")[objective]
        assert "needs as many images on every one, got 6, 3" in refusal
        assert "\n" not in refusal


def test_processes_share_each_batch_of_one_order():
    whole = EpochBatches(50, batch_size=8, seed=3)
    parts = [EpochBatches(50, batch_size=8, seed=3, rank=rank, num_processes=2) for rank in range(2)]
    for epoch in range(2):
        for sampler in (whole, *parts):
            sampler.set_epoch(epoch)
        for batch, first, second in zip(whole, *parts, strict=True):
            assert len(first) == len(second) == 4
            assert sorted(first + second) == sorted(batch)
