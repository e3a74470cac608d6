import pytest
import torch

from mio_export.train.objectives import MINCLoss
from mio_export.train.objectives.second_moment import second_moment_lag


def test_the_lag_is_the_relative_distance_where_nothing_is_noise():
    generator = torch.Generator().manual_seed(0)
    moment, fresh = (torch.randn(6, 6, dtype=torch.float64, generator=generator) for _ in range(2))
    expected = ((moment - fresh).norm() / fresh.norm()).item()
    assert second_moment_lag(moment, (fresh, fresh)) == pytest.approx(expected)
    assert second_moment_lag(fresh, (fresh, fresh)) == 0


def test_the_noise_of_few_images_is_not_lag():
    generator = torch.Generator().manual_seed(0)
    exact = torch.eye(64, dtype=torch.float64)
    lags = []
    for _ in range(20):
        halves = torch.randn(2, 256, 64, dtype=torch.float64, generator=generator)
        fresh = [half.T @ half / 256 for half in halves]
        plain = (exact - (fresh[0] + fresh[1]) / 2).norm() / exact.norm()
        assert plain > 0.3  # what one estimate would call stale
        lags.append(second_moment_lag(exact, (fresh[0], fresh[1])))
    assert sorted(lags)[10] < 0.1


def test_it_takes_two_measurements_running():
    loss = MINCLoss(4, second_moment_decay=0.99)
    monitor = loss.monitor()
    done = [monitor.intervene({"second_moment_lag": lag}) for lag in (0.3, 0.1, 0.3, 0.3, 0.3, float("nan"))]
    assert [line is not None for line in done] == [False, False, False, True, False, True]
    assert done[3].endswith("its memory was halved, to 50 steps")
    assert loss.decay.item() == pytest.approx(0.96)  # 100 steps, 50, 25


@pytest.mark.parametrize(("lag", "alarmed"), [(0.5, False), (0.51, True), (float("nan"), True)])
def test_a_stale_second_moment_is_an_alarm(lag, alarmed):
    alarm = MINCLoss(4).monitor().alarm({"second_moment_lag": lag})
    assert (alarm is not None and alarm.startswith("stale second moment: Λ is")) == alarmed


def test_a_resumed_monitor_counts_on():
    first, resumed = MINCLoss(4).monitor(), MINCLoss(4).monitor()
    first.intervene({"second_moment_lag": 0.3})
    resumed.load({"untrained": {}, **first.state()})
    assert resumed.intervene({"second_moment_lag": 0.3}) is not None


def test_memory_is_halved_down_to_one_step():
    loss = MINCLoss(4, second_moment_decay=0.9)
    memories = []
    for _ in range(5):
        loss.halve_memory()
        memories.append(1 / (1 - loss.decay.item()))
    assert memories == pytest.approx([5, 2.5, 1.25, 1, 1])


def test_a_changed_memory_keeps_the_average_an_average():
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(8, 4, dtype=torch.float64, generator=generator)
    loss = MINCLoss(4, norm="none", second_moment_decay=0.9)
    for step in range(6):
        loss(z, z, z, z)
        if step % 2:
            loss.halve_memory()
    torch.testing.assert_close(loss.corrected_second_moment(torch.float64), z.T @ z / 8)


@pytest.mark.parametrize("guarded", [False, True])
def test_the_guard_brings_the_oracle_back_from_beyond_its_bound(finite_oracle, guarded):
    loss = MINCLoss(4, norm="none", ordered=True, second_moment_decay=0.995)
    monitor, fired = loss.monitor(), []

    def look(table):
        moment = finite_oracle.second_moment(table)
        lag = second_moment_lag(loss.corrected_second_moment(moment.dtype), (moment, moment))
        if guarded and monitor.intervene({"second_moment_lag": lag}):
            fired.append(lag)

    features, _ = finite_oracle.train(loss, num_steps=4000, step=0.05, every=50, look=look)
    assert finite_oracle.reaches_the_optimum(features) == guarded
    assert bool(fired) == guarded
