"""The real engine of ADBO against the virtual clock: the same events give the same master, whatever is lost on the way."""

import heapq
import re
import time
from contextlib import nullcontext
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bilevel_jax import Levels, Problem, Result, Vars, samplers
from bilevel_jax.distributed import adbo, simulate
from bilevel_jax.distributed.adbo import Rates
from bilevel_jax.distributed.cluster import ClusterError, Inline, slept, train
from bilevel_jax.distributed.host import Run
from bilevel_jax.distributed.transport import Lost, Ready
from bilevel_jax.distributed.worker import (
    Back,
    Blank,
    Close,
    Estimated,
    Failed,
    Message,
    Reply,
    Round,
    Site,
    State,
    Worked,
    numbers,
)
from tests.checks import check_same
from tests.tables import thinned

N, n, m, C, K = 3, 2, 3, 6, 2
RATES = Rates(0.02, 0.03, 0.04, 0.05, 0.1, 0.06, 0.2, 0.07, 0.3)
KEY = jax.random.key(7)


def smooth(z, x, data):
    W, b = data
    return jnp.log(jnp.cosh(W @ z - x.sum() - b)) ** 2 + 0.1 * (z**2).sum()


def fit(z, x, a):
    return ((z[None] - a) ** 2).sum(1) / 2 + 0.3 * (x * z[:2]).sum()


PROBLEM = Problem(inner=smooth, outer=fit)
random = np.random.default_rng(0)
DATA = Levels((random.normal(size=(N, 4, m)), random.normal(size=(N, 4))), random.normal(size=(N, 4, m)))
SAMPLER = samplers.uniform(2)


@cache
def make(**own):
    """Not before a test begins, which is in float64."""
    own = {"n_workers": N, "max_cuts": C, "cut_period": 5, "cut_tolerance": 1e-6, "estimate_rounds": K} | own
    start = Vars(inner=jnp.zeros(m), outer=jnp.zeros(n))
    return adbo.adbo(own.pop("problem", PROBLEM), start, own.pop("rates", RATES), **own)


def load(worker):
    return jax.tree.map(lambda leaf: leaf[worker], DATA)


class Virtual:
    """Workers whose answers take the time that the virtual clock gives them; losses happen when it says."""

    def __init__(self, method, machines, seed=0):
        self.durations = [simulate.durations(machines, N, 500, seed, kind) for kind in (0, 1)]
        self.build = lambda worker: Site(method, SAMPLER, load, KEY, worker)
        self.sites, self.now, self.queue = {}, 0.0, []
        self.done, self.life, self.restarts = np.zeros((2, N), int), [0] * N, []
        for failure in machines.failures:
            self.push(failure.at, failure.worker, 1, None)
            if np.isfinite(failure.back):
                self.push(failure.back, failure.worker, 2, None)

    def push(self, at, worker, kind, answer):
        heapq.heappush(self.queue, (at, worker, kind, len(self.queue), self.life[worker], answer))

    def start(self, worker):
        self.push(0.0, worker, -1, None)

    def restart(self, worker):
        self.restarts.append(worker)  # it is back when its failure says so

    def stop(self, worker):
        self.restarts.append(worker)

    def send(self, worker, message):
        if worker in self.sites:
            answer = self.sites[worker].handle(message)
            assert not isinstance(answer.body, Failed | Blank), answer.body
            if answer.body is not None:
                kind = 0 if isinstance(answer.body, Worked) else 1
                self.push(self.now + self.durations[kind][worker, self.done[kind, worker]], worker, 0, answer)

    def wait_any(self, timeout):
        while self.queue:
            at, worker, kind, _, life, answer = heapq.heappop(self.queue)
            self.now = max(at, self.now)
            if kind == 1:
                self.sites.pop(worker)
                self.life[worker] += 1
                return Lost(worker, "the power went")
            if kind != 0:
                self.sites[worker] = self.build(worker)
                return Ready(worker)
            if life == self.life[worker]:
                self.done[int(not isinstance(answer.body, Worked)), worker] += 1
                return answer
        time.sleep(timeout)
        return None


MACHINES = simulate.Cluster(simulate.log_normal(0.03), slowdown=simulate.stragglers(N, 1, 4.0))
DOWN = {  # an answer under way; in the midst of the rounds of a cut; for good
    "none": (),
    "under way": (simulate.Failure(1, 0.07, 0.5), simulate.Failure(0, 0.9, 0.95)),
    "in a cut": tuple(simulate.Failure(2, at, at + 0.3) for at in (0.8, 1.7, 2.4, 3.3, 4.5, 5.5)),
    "for good": (simulate.Failure(1, 0.75),),
    "in the last cut": (simulate.Failure(0, 1.5),),
}


@thinned(
    ("quorum", "on_lost", "down", "steps"),
    [
        (2, "restore", "none", 40),
        (N, "wait", "none", 40),
        (1, "wait", "under way", 40),
        (2, "restore", "in a cut", 40),
        (2, "evict", "for good", 40),
        (2, "evict", "in the last cut", 10),
    ],
    (2, "restore", "in a cut", 40),
    (2, "evict", "in the last cut", 10),
)
def test_the_same_events_give_the_master_of_the_simulator(quorum, on_lost, down, steps):
    machines, method = MACHINES._replace(failures=DOWN[down]), make()
    known = {"steps": steps, "quorum": quorum, "max_staleness": 4, "on_lost": on_lost}
    plan = simulate.schedule(machines, method, **known)
    go = jax.jit(simulate.simulate, static_argnums=(0, 1))
    expected, rows = go(method, SAMPLER, plan, jax.tree.map(jnp.asarray, DATA), KEY)
    virtual = Virtual(method, machines)
    master, history = train(method, virtual, **known)
    assert len(plan.seconds) == int(master.step) == steps
    assert int(master.made) >= min(C, steps // method.cut_period)
    if down == "in the last cut":  # which begins again, and takes longer than the virtual clock says
        assert virtual.now > plan.period_seconds[-1]
    else:
        np.testing.assert_allclose(virtual.now, plan.period_seconds[-1], rtol=1e-12)
    alive = np.asarray(expected.alive)
    master, expected = (  # what an evicted worker left behind counts for nothing
        one._replace(**{name: getattr(one, name)[alive] for name in ("outer", "inner", "estimate_multiplier", "received")})
        for one in (master, expected)
    )
    master, expected = (
        one._replace(
            consensus_multiplier=one.consensus_multiplier[alive],
            received_at=one.received_at[alive],
            cuts=one.cuts._replace(inner=one.cuts.inner[alive], share=one.cuts.share[alive]),
        )
        for one in (master, expected)
    )
    check_same(master, expected, tol=1e-12)
    for name in ("step", "inner_gap", "cuts", "made", "refused", "inner_apart", "outer_apart", "result"):
        np.testing.assert_allclose(history[name], rows[name], rtol=1e-11, atol=1e-13, err_msg=name)
    assert history["lost"][-1] == len(machines.failures)
    if down == "none":
        traffic = simulate.traffic(method, plan, rows["made"])
        assert history["up"][1:].tolist() == traffic.up.tolist()
        assert history["down"][1:].tolist() == traffic.down.tolist()
        assert history["restored"].tolist() == [N * (2 * n + m + C + C * m)] * len(history["step"])
    elif down == "in a cut":
        assert (virtual.restarts != []) == (on_lost == "restore")


class Faulty(Inline):
    """Workers whose n-th answer (of all that they give in a life) is what ``spoil`` makes of it: another event, or none."""

    def __init__(self, spoil=lambda answer, n: answer, method=None, load=load):
        super().__init__(method or make(), SAMPLER, load, KEY)
        self.spoil, self.given, self.lives = spoil, [0] * N, [0] * N

    def start(self, worker):
        super().start(worker)
        self.lives[worker] += 1

    restart = start

    def send(self, worker, message):
        answer = self.sites[worker].handle(message)
        if answer.body is None:
            return
        self.given[worker] += 1
        event = self.spoil(answer, self.given[worker])
        if event is not None:
            self.events.append(event)


ALL = {"steps": 10, "quorum": N, "max_staleness": 4}  # every worker works at every iteration: losses change nothing


@pytest.fixture(scope="module")
def undisturbed():
    return jax.device_get(train(make(), Faulty(), **ALL)[0])


def once(worker, n, event):
    """Something else in the place of one answer."""
    state = {"left": 1}

    def spoil(answer, count):
        if (answer.worker, count) == (worker, n) and state["left"]:
            state["left"] = 0
            return event(answer) if callable(event) else event
        return answer

    return spoil


def not_a_number(answer):
    return answer._replace(body=answer.body._replace(inner=answer.body.inner * np.nan))


# the 8th answers are in a cut: five steps, two rounds, two rounds back
@thinned("n", [2, 7, 8], 7)
@pytest.mark.parametrize("fault", ["lost", "hangs", "raises", "nan", "forgets"])
def test_a_worker_that_is_restored_was_merely_late(fault, n, undisturbed):
    event = {
        "lost": lambda answer: Lost(answer.worker, "kill -9"),
        "hangs": None,
        "raises": lambda answer: answer._replace(body=Failed("Traceback ...")),
        "nan": lambda answer: answer._replace(body=answer.body._replace(**{answer.body._fields[0]: np.full(m, np.nan)})),
        "forgets": lambda answer: answer._replace(body=Blank()),
    }[fault]
    if fault == "nan" and n == 2:
        event = not_a_number
    transport = Faulty(once(1, n, event))
    master, history = train(make(), transport, **ALL, patience=0.2 if fault == "hangs" else 60.0)
    check_same(jax.device_get(master), undisturbed, tol=0)
    assert transport.lives == [1, 2, 1]
    assert history["lost"][-1] == 1
    assert history["restored"][-1] > history["restored"][0]


def test_answers_of_an_earlier_life_are_discarded(undisturbed):
    late = []

    def spoil(answer, n):
        if answer.worker == 1 and answer.incarnation == 0 and n == 3:
            wrong = answer._replace(body=Worked(answer.body.outer + 1, answer.body.inner - 1))
            late.extend([wrong, wrong._replace(number=answer.number + 1), wrong._replace(number=answer.number + 2)])
            return Lost(1)
        if late and answer.incarnation == 1:
            transport.events.extend(late)
            late.clear()
        return answer

    transport = Faulty(spoil)
    master, _ = train(make(), transport, **ALL)
    check_same(jax.device_get(master), undisturbed, tol=0)


@pytest.mark.more
def test_a_worker_that_keeps_failing_ends_the_run_with_all_that_is_known(tmp_path, undisturbed):
    def spoil(answer, n):
        return not_a_number(answer) if answer.worker == 2 and isinstance(answer.body, Worked) and n >= 4 else answer

    with pytest.raises(ClusterError, match=f"worker 2 was lost 3 times in a row: .*NaN.*iteration 3; .*{tmp_path}") as caught:
        train(make(), Faulty(spoil), **ALL, checkpoint=tmp_path / "run")
    error = caught.value
    assert error.result == Result.NONFINITE
    assert error.master is not None
    assert int(error.master.step) == 3
    assert all(np.isfinite(leaf).all() for leaf in error.master[1:6])
    assert error.history["step"].tolist() == [0]
    saved, _ = train(make(), Faulty(), **ALL, checkpoint=tmp_path / "run")  # and goes on, once the reason is gone
    check_same(jax.device_get(saved), undisturbed, tol=0)


def test_waiting_is_bounded_and_names_who_is_missing():
    def silent(answer, n):
        return None if answer.worker == 1 and n == 3 else answer

    known = ALL | {"quorum": 1, "on_lost": "wait", "patience": 0.2}
    with pytest.raises(ClusterError, match=r"worker 1: no answer for 0.2 seconds, .*iteration [5-9]; the state is not saved"):
        train(make(cut_period=10), Faulty(silent, make(cut_period=10)), **known)  # went on to the staleness, then blocked

    def revived(answer):
        back.events.append(Lost(1))
        back.start(1)  # by itself

    back = Faulty(once(1, 3, revived))
    master, history = train(make(), back, **known)
    assert (int(master.step), history["lost"][-1]) == (10, 1)
    with pytest.raises(ClusterError, match=r"worker 0 would not mend by itself, expected on_lost='restore'.*NaN"):
        train(make(), Faulty(once(0, 2, not_a_number)), **known)


def test_eviction_goes_on_without_and_ends_when_none_is_left():
    hang = once(1, 3, None)
    workers = Faulty(hang)
    master, history = train(make(), workers, **ALL, on_lost="evict", patience=0.2)
    assert workers.sites.keys() == {0, 2}  # the other one is ended
    assert master.alive.tolist() == [True, False, True]
    assert history["lost"].tolist()[-1] == 1
    with pytest.raises(ClusterError, match="the last one, was lost: no power"):
        train(make(), Faulty(lambda answer, n: Lost(answer.worker, "no power") if n > 3 else answer), **ALL, on_lost="evict")


class Failing(Faulty):
    """Workers that cannot start."""

    def start(self, worker):
        self.events.append(Lost(worker, "FileNotFoundError: no shard here", error=True))


def test_a_worker_that_cannot_start_ends_the_run_at_once():
    with pytest.raises(ClusterError, match=r"worker 0 did not come up: FileNotFoundError.*no shard here"):
        train(make(), Failing(), **ALL)
    with pytest.raises(TypeError, match=r"load\(0\): got list, expected Levels"):
        train(make(), Faulty(load=lambda worker: [1.0]), **ALL)


@thinned("on_lost", ["restore", "wait", "evict"], "restore")
def test_those_that_are_up_wait_for_one_that_starts_slowly(on_lost, undisturbed):
    """One after the other they take longer than the patience: nobody is lost as long as somebody comes."""

    class Slow(Faulty):
        quiet = 0.0

        def wait_any(self, timeout):
            if self.events and isinstance(self.events[0], Ready) and self.quiet < 0.3:
                time.sleep(timeout)
                self.quiet += timeout
                return None
            self.quiet = 0.0
            return super().wait_any(timeout)

    transport = Slow()
    master, history = train(make(), transport, **ALL, on_lost=on_lost, patience=0.5)
    assert transport.lives == [1] * N
    assert history["lost"][-1] == 0
    check_same(jax.device_get(master), undisturbed, tol=0)
    with pytest.raises(ClusterError, match=r"worker 1.*no answer for 0.2 seconds"):  # but the patience has an end
        train(make(), Hanging(), **ALL, on_lost=on_lost, patience=0.2)


def test_waiting_for_nobody_ends():
    run = Run(make(), Faulty(), N, 4, "restore", 0.2, None, None)
    run.begin(make().init())
    run.up[:] = True
    with pytest.raises(ClusterError, match=r"no worker has anything to answer, and none did for 0.2 seconds"):
        run._until(lambda: False)


class Hanging(Faulty):
    """Worker 1 never comes up."""

    def start(self, worker):
        if worker != 1:
            super().start(worker)

    restart = start


@thinned("interrupted", [1, 13, 16, 25], 13)
def test_a_master_that_was_interrupted_goes_on(interrupted, undisturbed, tmp_path):
    """In a period, between the rounds of a cut, after it: nothing is lost but the iteration under way."""

    class Stops(Faulty):
        left = interrupted

        def wait_any(self, timeout):
            if not self.events or isinstance(self.events[0], Ready):
                return super().wait_any(timeout)
            self.left -= 1
            if self.left < 0:
                raise KeyboardInterrupt
            return super().wait_any(timeout)

    rows = []
    with pytest.raises(KeyboardInterrupt):
        train(make(), Stops(), **ALL, checkpoint=tmp_path, on_row=rows.append)
    master, history = train(make(), Faulty(), **ALL, checkpoint=tmp_path, on_row=rows.append)
    check_same(jax.device_get(master), undisturbed, tol=0)
    assert history["step"].tolist() == [0, 5, 10] == [row["step"] for row in rows]
    assert history["made"].tolist() == [0, 1, 2]
    assert history["inner_gap"][-1] == undisturbed.inner_gap
    assert np.diff(history["seconds"]).min() > 0
    idle = Faulty()
    again, _ = train(make(), idle, **ALL, checkpoint=tmp_path)  # is done
    check_same(jax.device_get(again), undisturbed, tol=0)
    assert idle.lives == [0] * N
    further, history = train(make(), idle, **ALL | {"steps": 15}, checkpoint=tmp_path)
    assert history["step"].tolist() == [0, 5, 10, 15]
    assert int(further.step) == 15


@pytest.mark.more
def test_a_master_that_is_interrupted_at_any_message_goes_on(tmp_path):
    """Between an iteration, its cut, the messages that close it and the replies, nothing is done twice and nobody forgotten."""
    method = make(cut_period=2, estimate_rounds=1)
    known = ALL | {"steps": 4, "patience": 1.0}
    expected, whole = jax.device_get(train(method, Faulty(method=method), **known))

    class Stops(Faulty):
        def __init__(self, left):
            super().__init__(method=method)
            self.left = left

        def send(self, worker, message):
            self.left -= 1
            if self.left < 0:
                raise KeyboardInterrupt
            super().send(worker, message)

    messages = 3 + 4 * 3 + 2 * 3 * 3  # all that they hold; replies; cuts of a round, a round back and a close
    for k in range(messages + 1):
        rows, folder = [], tmp_path / str(k)
        with pytest.raises(KeyboardInterrupt) if k < messages else nullcontext():
            train(method, Stops(k), **known, checkpoint=folder, on_row=rows.append)
        master, history = train(method, Faulty(method=method), **known, checkpoint=folder, on_row=rows.append)
        check_same(jax.device_get(master), expected, tol=0)
        assert history["step"].tolist() == [0, 2, 4] == [row["step"] for row in rows]
        assert history["made"].tolist() == whole["made"].tolist()


def test_checkpoints_of_another_problem_are_refused(tmp_path):
    train(make(), Faulty(), **ALL, checkpoint=tmp_path)
    with pytest.raises(ValueError, match=r"checkpoint: .* holds a run with max_cuts = 6, expected 7"):
        train(make(max_cuts=7), Faulty(method=make(max_cuts=7)), **ALL, checkpoint=tmp_path)


def test_checkpoints_of_another_run_are_refused(tmp_path):
    train(
        make(), Faulty(), **ALL, checkpoint=tmp_path, metrics=lambda vars: {"norm": vars.inner.sum(), "top": vars.inner.max()}
    )
    idle, other = Faulty(), lambda vars: {"least": vars.inner.min(), "top": vars.inner.max()}
    with pytest.raises(ValueError, match=rf"metrics: got others than .*{tmp_path}, expected the same: \['least', 'norm'\]"):
        train(make(), idle, **ALL | {"steps": 15}, checkpoint=tmp_path, metrics=other)
    with pytest.raises(ValueError, match="holds a run with quorum = 3, expected 2"):
        train(make(), idle, **ALL | {"quorum": 2}, checkpoint=tmp_path)
    assert idle.lives == [0] * N


def test_an_error_is_not_replaced_by_one_of_the_disk(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError("no space left")

    broken = lambda answer, n: answer._replace(body=Estimated(np.zeros(m))) if n == 2 else answer
    known = ALL | {"checkpoint": tmp_path / "run"}
    with monkeypatch.context() as disk:
        disk.setattr("orbax.checkpoint.CheckpointManager.save", full)
        with pytest.raises(ClusterError, match=r"answer of worker .*state is not saved: OSError: no space left\)"):
            train(make(), Faulty(broken), **known)
        with pytest.raises(ZeroDivisionError) as caught:
            train(make(), Faulty(lambda answer, n: answer if n < 2 else 1 / 0), **known)
        assert "not saved: OSError: no space left" in caught.value.__notes__[0]
    with pytest.raises(ClusterError, match=rf"not saved: nothing was done, and {tmp_path}/run is as it was"):
        train(make(), Failing(), **known)


def test_counts_may_be_of_numpy(tmp_path):
    method = make(n_workers=np.int64(N))
    known = {name: np.int64(value) for name, value in ALL.items()}
    master, _ = train(method, Faulty(method=method), **known, checkpoint=tmp_path)
    again, _ = train(make(), Faulty(), **ALL, checkpoint=tmp_path)
    check_same(jax.device_get(again), jax.device_get(master), tol=0)


def test_drained_workers_are_not_asked_again_after_an_interruption(tmp_path):
    """A quorum of one: those that were drained before the cut are still to be counted when the run is taken up."""
    method, known = make(), {"quorum": 1, "max_staleness": 4}
    whole, _ = train(method, Virtual(method, MACHINES), steps=10, **known)
    virtual = Virtual(method, MACHINES)
    train(method, virtual, steps=5, **known, checkpoint=tmp_path)
    resumed, first = Faulty(), {}
    send = resumed.send
    resumed.send = lambda worker, message: (first.setdefault(worker, message.body), send(worker, message))
    master, _ = train(method, resumed, steps=10, **known, checkpoint=tmp_path)
    assert (int(master.step), int(whole.step)) == (10, 10)
    drained = simulate.schedule(MACHINES, method, steps=5, **known).drained[0]
    assert 0 < drained.sum() < N
    assert [first[worker].work for worker in range(N)] == (~drained).tolist()


def test_divergence_of_the_master_keeps_the_last_finite_state():
    method = make(rates=RATES._replace(consensus_outer=1e200))
    with pytest.raises(ClusterError, match="master's variables became NaN or infinite") as caught:
        train(method, Faulty(method=method), **ALL)
    assert caught.value.result == Result.NONFINITE
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(caught.value.master._replace(inner_gap=0.0)))


def body(kind):
    zeros = np.zeros
    held = adbo.Worker(zeros(n), zeros(m), zeros(n), zeros(C), zeros((C, m)), np.int32(0))
    return {
        "State": State(held, True, None),
        "Reply": Reply(1, zeros(n), zeros(C)),
        "Round": Round(1, 0, zeros(n), zeros(m), zeros(m)),
        "Back": Back(0, zeros(m)),
        "Close": Close(zeros(C), 0, zeros(m)),
    }[kind]


@pytest.mark.parametrize(
    ("kind", "field", "wrong", "error"),
    [
        ("Reply", "consensus_multiplier", np.zeros(n + 1), r"got float64\[3\], expected float64\[2\]"),
        ("Reply", "cut_multiplier", np.zeros(C, np.float32), r"got float32\[6\], expected float64\[6\]"),
        ("Round", "outer", None, r"got NoneType, expected float64\[2\]"),
        ("Round", "consensus", np.zeros((1, m)), r"got float64\[1, 3\], expected float64\[3\]"),
        ("Back", "cotangent", [0.0] * m, r"got list, expected float64\[3\]"),
        ("Close", "cut_inner", np.zeros(2), r"got float64\[2\], expected float64\[3\]"),
    ],
)
def test_a_worker_refuses_messages_that_do_not_fit(kind, field, wrong, error):
    site = Site(make(), SAMPLER, load, KEY, 1)
    assert isinstance(site.handle(Message(1, 0, 1, body("Reply"))).body, Blank)  # it knows nothing yet
    assert isinstance(site.handle(Message(1, 4, 1, body("State"))).body, Worked)
    assert isinstance(site.handle(Message(1, 3, 2, body("Reply"))).body, Blank)  # of another life
    answer = site.handle(Message(1, 4, 2, body(kind)._replace(**{field: wrong})))
    assert isinstance(answer.body, Failed)
    assert answer[:3] == (1, 4, 2)
    assert re.search(f"ValueError: message to worker 1: {kind}.{field}: {error}", answer.body.traceback)
    assert isinstance(site.handle(Message(1, 4, 3, body("Reply"))).body, Worked)  # and lives on


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        (Worked(np.zeros(n), np.zeros(m, np.float32)), r"Worked.inner: got float32\[3\], expected float64\[3\]"),
        (Worked(np.zeros(m), np.zeros(m)), r"Worked.outer: got float64\[3\], expected float64\[2\]"),
        (Estimated(np.zeros(m)), "got Estimated, expected Worked"),
    ],
)
def test_the_master_refuses_answers_that_do_not_fit(wrong, error):
    with pytest.raises(ClusterError, match=f"answer of worker 2: {error}"):
        train(make(), Faulty(once(2, 2, lambda answer: answer._replace(body=wrong))), **ALL)


@pytest.mark.parametrize(
    ("own", "error"),
    [
        ({"steps": 7}, "steps: got 7, expected a multiple of the method's cut_period = 5"),
        ({"steps": 0}, "steps: got 0, expected at least 1"),
        ({"quorum": 4}, "quorum: got 4, expected at most n_workers = 3"),
        ({"quorum": 0}, "quorum: got 0, expected at least 1"),
        ({"max_staleness": 0}, "max_staleness: got 0, expected at least 1"),
        ({"every": 0}, "every: got 0, expected at least 1"),
        ({"patience": 0.0}, "patience: got 0.0, expected a positive number"),
        ({"on_lost": "pray"}, "on_lost: got 'pray', expected 'wait', 'restore' or 'evict'"),
    ],
)
def test_settings_that_make_no_sense_are_refused(own, error):
    with pytest.raises(ValueError, match=error):
        train(make(), Faulty(), **ALL | own)


def test_waiting_for_workers_that_do_not_come_back_is_refused():
    transport = Faulty()
    transport.revive = False
    with pytest.raises(ValueError, match="on_lost: got 'wait' and workers with revive=False, expected revive=True"):
        train(make(), transport, **ALL, on_lost="wait")


@pytest.mark.parametrize("name", ["step", "lost", "made", "result"])
def test_metrics_with_names_of_other_columns_are_refused(name):
    transport = Faulty()
    with pytest.raises(ValueError, match=rf"metrics: got \['{name}'\], expected names that are not columns"):
        train(make(), transport, **ALL, metrics=lambda vars: {name: vars.inner.sum(), "norm": vars.inner.sum()})
    assert transport.lives == [0] * N


def test_slowdowns_that_fit_no_worker_are_refused():
    for wrong, error in (([1.0, 2.0], r"slowdown: got the shape \(2,\)"), (-1.0, "slowdown: got -1.0, expected positive")):
        with pytest.raises(ValueError, match=error):
            slept(simulate.Cluster(simulate.constant(1.0), slowdown=np.array(wrong)), 3, 10)


def test_a_master_of_another_problem_is_refused():
    with pytest.raises(ValueError, match=r"master.received: got float64\[3, 7\], expected float64\[3, 6\]"):
        train(make(), Faulty(), **ALL, master=make(max_cuts=7).init())


def test_the_start_of_each_worker_and_metrics():
    method = make()
    start = method.init(Vars(inner=jnp.arange(N * m, dtype=float).reshape(N, m)))
    seen = []
    metrics = lambda vars: {"norm": (vars.inner**2).sum()}
    master, history = train(method, Faulty(), **ALL, master=start, metrics=metrics, on_row=seen.append)
    assert int(start.step) == 0  # not donated
    assert not start.inner.is_deleted()
    assert history["norm"].shape == (3,)
    np.testing.assert_allclose(history["norm"][-1], (master.consensus_inner**2).sum(), rtol=1e-14)
    assert [row["norm"] for row in seen] == history["norm"].tolist()


def test_delays_are_slept():
    method, naps = make(), []
    site = Site(method, SAMPLER, load, KEY, 1, lambda worker, number: naps.append((worker, number)) or 0.0)
    site.handle(Message(1, 0, 1, body("State")))
    site.handle(Message(1, 0, 2, body("Close")))
    site.handle(Message(1, 0, 3, body("Reply")))
    assert naps == [(1, 1), (1, 3)]
    assert numbers(body("State")) == 2 * n + m + C + C * m
