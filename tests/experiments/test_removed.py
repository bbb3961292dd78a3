"""`benchmarks.removed`: what records of before and of today say."""

from benchmarks import removed


def record(task, method, epochs, losses):
    return {
        "task": task,
        "method": method,
        "lr": None,
        "seed": 0,
        "epochs": epochs,
        "train_examples": 50_000,
        "test_examples": 5_000,
        "batch_size": 64,
        "test_loss": losses[-1],
        "curves": dict.fromkeys(("train_loss", "test_loss", "test_accuracy", "seconds"), losses),
    }


def test_ratios_are_of_equal_tasks_and_lengths():
    name = "adler-muon"
    before = [
        record("long/cifar10/mlp", name, 4, [4.0, 3.0, 2.0, 1.0]),
        record("long/cifar10/vit", name, 4, [4.0, 3.0, 2.0, 1.0]),
    ]
    now = [record("long/cifar10/mlp", name, 4, [2.0, 2.0, 2.0, 1.1])]
    table = removed.long_tasks(before, now)
    assert "| AdlerMuon | 3,200 | 1.100 | 1 |" in table
    assert "AdlerScheduleFree" not in table


def test_losses_in_a_loop_are_of_the_seeds_of_both():
    def run(seed, loss):
        return {"optimizer": "AdlerMuon", "seed": seed, "losses": {"250": loss}}

    table = removed.nanogpt([run(0, 2.0), run(1, 4.0), run(2, 9.0)], [run(0, 1.0), run(1, 2.0)])
    assert table.splitlines()[-1] == "| AdlerMuon | 250 | 3.000 | 1.500 | 2 |"


def test_what_is_committed_is_what_the_records_say(tmp_path, monkeypatch):
    folder = removed._RESULTS / "removed"
    names = ("mean-of-parts.md", "every-eighth.md", "rounding.md")
    committed = {name: (folder / name).read_text() for name in names}
    said = {}
    monkeypatch.setattr(type(folder), "write_text", lambda path, text: said.update({path: text}))
    removed.main()
    assert said == {folder / name: text for name, text in committed.items()}
