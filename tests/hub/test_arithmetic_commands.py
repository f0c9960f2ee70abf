"""`molora hub mix | average | negate | compress | similarity | cluster`, as a user types them.

What they write is loaded by PEFT and compared, layer by layer, with dense sums of the weight changes of what they read.
"""

import json

import pytest
import torch
from safetensors.torch import load_file

from molora import cli
from molora.hub.store import Hub
from tests.adapters import CONFIG, WEIGHTS
from tests.hub.loras import Q, V, lora
from tests.hub.test_hub_cli import SUMS, parsers, run

EACH = "--debug --json --root"
FLAGS = {
    "mix": f"adapters {EACH} --dtype --out --rank --tolerance",
    "average": f"adapters {EACH} --dtype --out --rank --tolerance",
    "negate": f"adapter {EACH} --dtype --out",
    "compress": f"adapter {EACH} --dtype --out --rank --tolerance",
    "similarity": f"adapters {EACH}",
    "cluster": f"adapters {EACH} --groups --out --rank --seed",
}


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A library with `news` and `films` of different rank and scale, and a folder `law` outside of it."""
    hub = Hub(tmp_path / "hub")
    hub.add(lora(tmp_path / "a", seed=1, rank=2), "news", task="topic")
    hub.add(lora(tmp_path / "b", seed=2, rank=3, alpha=9.0, paths=(Q,)), "films", task="tone")
    lora(tmp_path / "law", seed=3, rank=1)
    monkeypatch.setenv("MOLORA_HUB", str(hub.root))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def dense(folder):
    """The weight change of each layer (d_out, d_in), from the file and the config alone."""
    config, tensors = json.loads((folder / CONFIG).read_text()), load_file(folder / WEIGHTS)
    found = {}
    for path in (Q, V):
        A = tensors.get(f"base_model.model.{path}.lora_A.weight")
        if A is None:
            continue
        rank = config.get("rank_pattern", {}).get(f"^{path.replace('.', chr(92) + '.')}", config["r"])
        assert rank == A.shape[0]
        alpha = config.get("alpha_pattern", {}).get(f"^{path.replace('.', chr(92) + '.')}", config["lora_alpha"])
        B = tensors[f"base_model.model.{path}.lora_B.weight"]
        found[path] = alpha / rank * B.double() @ A.double()
    return found


def close(a, b):
    torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5, check_dtype=False)


def test_the_flags_are_frozen():
    found = parsers()
    assert set(FLAGS) == SUMS
    for name, flags in FLAGS.items():
        actions = [a for a in found[name]._actions if a.dest != "help"]
        assert {s for a in actions for s in (a.option_strings or [a.dest])} == set(flags.split()), name


@pytest.mark.parametrize("command", sorted(FLAGS))
def test_help(command, capsys):
    code, text, _ = run(capsys, command, "--help")
    assert code == 0 and f"example:\n  molora hub {command}" in text
    assert all(flag in text for flag in FLAGS[command].split() if flag.startswith("-"))
    assert all(action.help for action in parsers()[command]._actions)


def test_a_mix_of_a_name_a_version_and_a_folder(here, capsys):
    code, out, err = run(capsys, "mix", "news=0.7", "films@1=-0.5", "./law=2", "--out", "blend", "--json")
    facts, got = json.loads(out), dense(here / "blend")
    news, films, law = (dense(here / name) for name in ("a", "b", "law"))
    close(got[Q], 0.7 * news[Q] - 0.5 * films[Q] + 2 * law[Q])
    close(got[V], 0.7 * news[V] + 2 * law[V])
    assert (code, err, facts["weights"]) == (0, [], {"news": 0.7, "films@1": -0.5, "./law": 2.0})
    assert facts["ranks"] == {Q: 6, V: 3} and facts["error"] == 0.0 and facts["layers"] == 2
    norm = (got[Q].square().sum() + got[V].square().sum()).sqrt().item()
    assert facts["norm"] == pytest.approx(norm, rel=1e-6)


def test_average_of_a_lower_rank_tells_its_error(here, capsys):
    code, out, _ = run(capsys, "average", "news", "films", "--rank", "2", "--out", "mean", "--json")
    facts, got = json.loads(out), dense(here / "mean")
    news, films = dense(here / "a"), dense(here / "b")
    want = {Q: (news[Q] + films[Q]) / 2, V: news[V] / 2}
    lost = torch.linalg.svdvals(want[Q])[2:].square().sum()  # Eckart and Young
    close((got[Q] - want[Q]).square().sum(), lost)
    close(got[V], want[V])
    total = sum(delta.square().sum() for delta in want.values())
    assert (
        code == 0 and facts["error"] == pytest.approx((lost / total).sqrt().item(), rel=1e-5) and facts["error"] > 0.01
    )
    assert facts["ranks"] == {Q: 2, V: 2}


def test_what_people_see(here, capsys):
    code, out, err = run(capsys, "negate", "news", "--out", "less", "--dtype", "bfloat16")
    assert (code, err) == (0, [])
    assert (dense(here / "less")[Q] + dense(here / "a")[Q]).norm() < 0.02 * dense(here / "a")[Q].norm()
    assert load_file(here / "less" / WEIGHTS)[f"base_model.model.{Q}.lora_A.weight"].dtype == torch.bfloat16
    assert out.splitlines()[0].startswith("2 layers of rank 2, norm ") and "molora hub add less NAME" in out
    code, out, _ = run(capsys, "compress", "films", "--rank", "1", "--out", "small")
    lines = out.splitlines()
    assert lines[0].split() == ["layer", "rank", "now", "error"] and lines[2].split()[:3] == [Q, "3", "1"]
    values = torch.linalg.svdvals(dense(here / "b")[Q])
    assert float(lines[2].split()[3]) == pytest.approx((values[1:].norm() / values.norm()).item(), rel=0.05)
    code, out, _ = run(capsys, "compress", "films", "--tolerance", "0.999", "--out", "small", "--json")
    assert json.loads(out)["ranks"] == {Q: 1} and set(json.loads(out)["errors"]) == {Q}


def test_similarity(here, capsys):
    code, out, _ = run(capsys, "similarity", "news", "films", "./law", "--json")
    found = json.loads(out)
    flat = []
    for name in ("a", "b", "law"):
        delta = dense(here / name)
        flat.append(torch.cat([delta.get(path, torch.zeros(1024 if path == Q else 512)).flatten() for path in (Q, V)]))
    want = [[torch.cosine_similarity(a, b, dim=0).item() for b in flat] for a in flat]
    assert code == 0 and found["adapters"] == ["news", "films", "./law"]
    close(torch.tensor(found["similarity"]), torch.tensor(want))
    code, out, _ = run(capsys, "similarity")  # all of the library
    head, _, *rows = out.splitlines()
    assert head.split() == ["cosine", "films@1", "news@1"]
    assert rows[0].split() == ["films@1", "1.000", f"{want[1][0]:.3f}"]


def test_cluster_finds_planted_groups_and_writes_their_averages(here, capsys):
    """Two families: each member is one LoRA of its family plus a little of another one."""
    for family, seed in (("x", 11), ("y", 12)):
        lora(here / family, seed=seed)
        for number in range(2):
            lora(here / f"n{seed}{number}", seed=100 * seed + number)
            assert run(capsys, "mix", f"./{family}=1", f"./n{seed}{number}=0.2", "--out", f"{family}{number}")[0] == 0
    members = ["./x0", "./y0", "./y1", "./x1"]
    code, out, _ = run(capsys, "cluster", *members, "--groups", "2", "--out", "groups", "--json")
    found = json.loads(out)
    assert code == 0 and [g["adapters"] for g in found["groups"]] == [["./x0", "./x1"], ["./y0", "./y1"]]
    assert all(group["least_cosine"] > 0.9 and group["error"] < 1e-6 for group in found["groups"])
    close(dense(here / "groups/group_1")[V], (dense(here / "y0")[V] + dense(here / "y1")[V]) / 2)
    code, out, _ = run(capsys, "cluster", *members, "--groups", "2")
    assert out.splitlines()[2].split()[:3] == ["0", "./x0,", "./x1"] and "spread" in out
    code, out, err = run(capsys, "cluster", *members, "--groups", "2", "--out", "groups")
    assert code == 2 and "exists and is not an empty folder" in err[0]


BAD = [
    (["mix", "news", "films=x", "--out", "o"], "2 problems: 'news' is not ADAPTER=WEIGHT; write news=0.7; 'films=x'"),
    (["mix", "news=nan", "--out", "o"], "finite weights"),
    (["mix", "news=0", "--out", "o"], "all weights are 0"),
    (["mix", "news=1", "news=2", "--out", "o"], "there twice"),
    (["mix", "nws=1", "./gone=1", "--out", "o"], "did you mean 'news'"),
    (["mix", "nws=1", "./gone=1", "--out", "o"], "there is no folder './gone'"),
    (["mix", "news=1", "--rank", "0", "--out", "o"], "rank >= 1"),
    (["average", "news", "--tolerance", "2", "--out", "o"], "tolerance < 1"),
    (["average", "news"], "required: --out; see molora hub average --help"),
    (["compress", "./broken", "--rank", "1", "--out", "o"], "DoRA"),
    (["similarity", "news", "news"], "'news' is there twice"),
    (["similarity", "--root", "none"], "there is no library at"),
    (["cluster", "--groups", "3"], "1 to 2 groups"),
    (["cluster", "--groups", "1", "--rank", "2"], "give --out DIR too"),
]


@pytest.mark.parametrize(("argv", "says"), BAD, ids=[" ".join(argv) for argv, _ in BAD])
def test_bad_input_is_one_line_and_writes_nothing(argv, says, here, capsys):
    lora(here / "broken", use_dora=True)
    code, out, lines = run(capsys, *argv)
    assert (code, out, len(lines)) == (2, "", 1), lines
    assert says in lines[0]
    assert not (here / "o").exists()


def test_an_earlier_folder_is_replaced_as_a_whole_or_stays(here, capsys):
    assert run(capsys, "negate", "news", "--out", "o")[0] == 0
    before = (here / "o" / WEIGHTS).read_bytes()
    assert cli.main(["hub", "mix", "news=1e300", "--out", "o"]) == 2  # too large for float32
    assert "does not fit into" in capsys.readouterr().err
    assert (here / "o" / WEIGHTS).read_bytes() == before
    assert sorted(path.name for path in (here / "o").iterdir()) == ["README.md", CONFIG, WEIGHTS]
