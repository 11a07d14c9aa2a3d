"""The demo in pictures, in pieces: what it draws with, how it samples, what it measures, and a run of a few steps."""

import json
import math

import pytest
import torch
from demo_cases import arguments, one_thread, silent  # noqa: F401 - a fixture

from fastkd import demo, demo_assets, demo_digits, demo_images, demo_images_report
from fastkd.demo_digits import SCALE, TRIG, MeanVelocity, Transformer
from fastkd.diffusion import network_jvp


@pytest.fixture
def network():
    """No parameter is 0."""
    torch.manual_seed(0)
    found = Transformer(width=16, depth=2, heads=2)
    for p in found.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return found


class Oracle(torch.nn.Module):
    """F of TrigFlow where the data are one picture."""

    def __init__(self, picture):
        super().__init__()
        self.picture = picture

    def forward(self, x, t, labels):
        cos, sin = (f(t)[:, None, None] for f in (torch.cos, torch.sin))
        noise = (SCALE * x - cos * self.picture) / sin
        return (cos * noise - sin * self.picture) / SCALE


class Straight(Oracle):
    """The mean velocity of RectifiedFlow there."""

    def forward(self, x, t, r, labels):
        return (x - self.picture) / t[:, None, None]


# --- what it draws with ---


def test_digits_are_those_of_scikit_learn():
    pictures, labels = demo_digits.load()
    assert pictures.shape == (1797, 8, 8) and labels.bincount().min() > 170 and labels.max() == 9
    assert pictures.min() == -1 and pictures.max() == 1
    assert abs(pictures.std().item() - SCALE) < 0.02


def test_patches_are_cut_row_by_row_and_put_together_again():
    x = torch.arange(2 * 64.0).view(2, 8, 8)
    cut = demo_digits.patches(x)
    assert cut.shape == (2, 16, 4) and cut[0, 1].tolist() == [2, 3, 10, 11] and cut[0, 4].tolist() == [16, 17, 24, 25]
    assert torch.equal(demo_digits.pictures(cut), x)


def test_at_first_it_predicts_nothing_and_a_gap_changes_nothing():
    network, x = Transformer(), torch.randn(3, 8, 8)
    t, labels = torch.rand(3), torch.tensor([0, 5, 9])
    assert not network(x, t, labels).any()
    torch.nn.init.normal_(network.onto.weight)
    assert torch.equal(network(x, t, labels), network(x, t, labels, t / 2)) and network(x, t, labels).any()


def test_the_mean_over_no_time_is_the_velocity(network):
    x, t, labels = torch.randn(3, 8, 8), torch.tensor([0.1, 0.5, 0.9]), torch.tensor([0, 5, 9])
    torch.nn.init.zeros_(network.gap[-1].weight)
    torch.nn.init.zeros_(network.gap[-1].bias)
    alpha, sigma = 1 - t, t
    size = (alpha.square() + (sigma / SCALE).square()).sqrt()[:, None, None]
    angle = torch.atan2(sigma / SCALE, alpha)
    y = x / size
    x_0 = angle.cos()[:, None, None] * y - SCALE * angle.sin()[:, None, None] * network(y / SCALE, angle, labels)
    want = (x - x_0) / t[:, None, None]
    torch.testing.assert_close(MeanVelocity(network)(x, t, t, labels), want, rtol=1e-4, atol=1e-5)


# --- samples and what they are worth ---


@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize("way", ["along_the_flow", "by_consistency", "by_mean_velocity"])
def test_who_knows_the_data_draws_them(way, steps):
    picture = torch.linspace(-1, 1, 64).view(8, 8)
    oracle = (Straight if way == "by_mean_velocity" else Oracle)(picture)
    sample = getattr(demo_images, way)(oracle, steps)
    x = sample(torch.randn(4, 8, 8), torch.arange(4))
    torch.testing.assert_close(x, picture.expand(4, 8, 8), rtol=1e-4, atol=1e-4)


def test_the_second_step_of_consistency_begins_with_noise_of_its_own():
    seen = []

    class Watched(Oracle):
        def forward(self, x, t, labels):
            seen.append((x, t))
            return super().forward(x, t, labels)

    noise = torch.randn(4, 8, 8)
    demo_images.by_consistency(Watched(torch.ones(8, 8)), 2)(noise, torch.arange(4))
    (first, end), (second, middle) = seen
    torch.testing.assert_close(first, noise)
    assert end.unique().item() == pytest.approx(math.pi / 2)
    assert middle.unique().item() == pytest.approx(demo_images.MIDDLE)
    want = TRIG.add_noise(torch.ones(4, 8, 8), noise.flip(0), middle) / SCALE
    torch.testing.assert_close(second, want, rtol=1e-4, atol=1e-4)


def test_distance_of_normal_distributions():
    x = torch.randn(5000, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    trace = x.T.cov().trace().item()
    assert demo_digits.distance(x, x) == pytest.approx(0, abs=1e-9)
    assert demo_digits.distance(x, x + torch.tensor([3.0, 0, 4.0])) == pytest.approx(25, rel=1e-9)
    mean = x.mean(0).square().sum().item()
    assert demo_digits.distance(x, 3 * x) == pytest.approx(4 * (trace + mean), rel=1e-9)


def test_the_judge_learns_digits():
    pictures, labels = demo_digits.load()
    judge = demo_digits.judge_of(pictures[:-297], labels[:-297], 150, 0)
    assert (judge(pictures[-297:]).argmax(1) == labels[-297:]).double().mean() > 0.85
    assert judge.features(pictures[:5]).shape == (5, 64) and not any(p.requires_grad for p in judge.parameters())


# --- training ---


def test_the_pace():
    paces = [demo_images.pace(i, 100) for i in range(100)]
    assert paces[0] < 0.3 and max(paces) > 0.95 and paces[-1] < 0.01
    assert all(0 < demo_images.pace(i, steps) <= 1 for steps in (1, 2, 7) for i in range(steps))


@pytest.mark.parametrize("which", ["teacher", "sCM", "MeanFlow", "DMD"])
def test_every_loss_moves_every_part_of_its_network(which, network):
    torch.manual_seed(1)
    data, teacher = demo_digits.Digits(*demo_digits.load(), 8, seed=0), Transformer(width=16, depth=2, heads=2)
    mean = MeanVelocity(network)
    loss, learns = {
        "teacher": lambda: (demo_images.flow_matching(network, data), network),
        "sCM": lambda: (demo_images.scm(network, teacher, data, 1), network),
        "MeanFlow": lambda: (demo_images.meanflow(mean, MeanVelocity(teacher), data, 1), mean),
        "DMD": lambda: (demo_images.dmd(network, teacher, data, 1e-3), network),
    }[which]()
    before = [p.clone() for p in teacher.parameters()]
    value = loss(3)
    value.backward()
    still = {name for name, p in learns.named_parameters() if p.grad is None or not p.grad.any()}
    assert value.isfinite() and still == {n for n, _ in learns.named_parameters() if "gap" in n and which != "MeanFlow"}
    assert all(map(torch.equal, before, teacher.parameters())) and all(p.grad is None for p in teacher.parameters())


def test_a_step_is_the_same_by_both_ways():
    found = {way: demo_images.step_of(way, 8, 3)().clone() for way in demo_images.WAYS}
    assert found["math"].abs().max() > 0
    torch.testing.assert_close(found["fastkd"], found["math"], rtol=1e-3, atol=1e-4 * found["math"].abs().max().item())


def test_the_tangent_of_its_network_is_a_difference_quotient(network):
    network.double()
    draw = torch.Generator().manual_seed(0)
    x, v = (torch.randn(2, 8, 8, generator=draw, dtype=torch.float64) for _ in range(2))
    t, labels, h = torch.tensor([0.3, 1.2], dtype=torch.float64), torch.tensor([1, 2]), 1e-5
    tangent = network_jvp(network, (x, t), (v, torch.ones_like(t)), labels=labels)[1]
    want = (network(x + h * v, t + h, labels) - network(x - h * v, t - h, labels)) / (2 * h)
    torch.testing.assert_close(tangent, want, rtol=1e-6, atol=1e-7)


# --- all of it ---


@pytest.fixture(scope="module")
def drawn():
    with pytest.MonkeyPatch.context() as patched:
        for name, value in {"DRAWN": 40, "SIDES": (8, 16), "MEASURED": {8: 2, 16: 2}, "COUNTED": 1}.items():
            patched.setattr(demo_images, name, value)
        return [demo_images.draw(arguments("--images", "--steps=2", "--batch=6"), silent) for _ in range(2)]


def test_the_same_seed_draws_the_same(drawn):
    (result, shown), (again, shown_again) = drawn
    assert result["rows"] == again["rows"] and all(map(torch.equal, shown, shown_again))
    names = [(row["name"], row["steps"]) for row in result["rows"]]
    assert names == [("teacher", n) for n in (32, 2, 1)] + [(s, n) for s in ("sCM", "MeanFlow", "DMD") for n in (2, 1)]
    assert all(0 <= row["accuracy"] <= 1 and row["distance"] > 0 for row in result["rows"])
    assert [x.shape for x in shown] == [(20, 8, 8)] * len(names)
    assert [row["tokens"] for row in result["costs"]] == [16, 64]
    assert all(row[way]["ms"] > 0 for row in result["costs"] for way in demo_images.WAYS)


@pytest.mark.parametrize("measurable", [True, False])
def test_report(drawn, measurable, tmp_path, capsys):
    result, shown = drawn[0]
    result = json.loads(json.dumps(result)) | {"seconds": 61.0}
    if not measurable:
        for row in result["costs"]:
            row["math"]["peak_bytes"] = None
    demo_images_report.write(result, shown, tmp_path / "new")
    assert json.loads((tmp_path / "new" / "images.json").read_text()) == result
    assert (tmp_path / "new" / "images.png").read_bytes().startswith(b"\x89PNG")
    printed, text = capsys.readouterr().out, demo_images_report.markdown(result)
    for row in result["rows"]:
        for where in (printed, text):
            assert demo_images_report.name_of(row) in where and f"{row['accuracy']:.1%}" in where
    assert ("not measured" in text) == (not measurable) and "61 s in all" in text and "61 s in all" in printed


def test_the_command(tmp_path, monkeypatch, capsys):
    seen = {}

    def draw(args, stage):
        seen.update(vars(args))
        return {"rows": []}, []

    monkeypatch.setattr(demo_images, "draw", draw)
    monkeypatch.setattr(demo_images_report, "write", lambda result, shown, folder: seen.update(result, folder=folder))
    assert demo.run(arguments("--images", "--batch=7", "--seed=3", f"--out={tmp_path}")) == 0
    assert (seen["steps"], seen["batch"], seen["seed"]) == (demo.SIZES["images"]["steps"], 7, 3)
    assert seen["folder"] == tmp_path and seen["seconds"] > 0


def test_missing_libraries_are_one_line_and_status_2(monkeypatch, capsys):
    monkeypatch.setattr(demo_assets, "IMAGE_LIBRARIES", ("json", "no_such_library"))
    assert demo.run(arguments("--images")) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "needs no_such_library;" in line and 'pip install "fastkd[demo]"' in line


@pytest.mark.parametrize("other", ["--on-policy", "--teacher=cached"])
def test_one_way_at_a_time(other, capsys):
    with pytest.raises(SystemExit):
        arguments("--images", other)
    assert "not allowed with" in capsys.readouterr().err
