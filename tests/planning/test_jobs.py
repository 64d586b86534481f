"""Files of jobs: every format gives the same jobs, and an error names its line."""

import json

import pytest

from wancli.errors import InputError, SettingsError, UsageError, WancliError
from wancli.planning.jobs import JobSeeds, read_jobs

KNOWN = {
    "generate": {"steps", "num_frames", "size", "lora", "model"},
    "rollout": {"chunks", "steps"},
    "repro": {"file"},
}


@pytest.fixture
def read(tmp_path):
    def read(content, name="b.jsonl"):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return read_jobs(path, KNOWN)

    return read


def as_rows(batch):
    return [
        (job.prompt, job.seed, job.output, dict(batch.settings[job.settings].values))
        for job in batch.jobs
    ]


SAME = {
    "b.jsonl": '{"defaults": {"steps": "4"}}\n{"prompt": "a", "seed": 1}\n{"prompt": "b, c"}\n',
    "b.csv": 'prompt,seed,steps\na,1,4\n"b, c",,4\n',
    "b.tsv": "prompt\tseed\tsteps\na\t1\t4\nb, c\t\t4\n",
    "b.toml": '[defaults]\nsteps = "4"\n[[jobs]]\nprompt = "a"\nseed = 1\n[[jobs]]\nprompt="b, c"',
}


@pytest.mark.parametrize("name", SAME)
def test_each_format_gives_the_same_jobs(read, name):
    batch = read(SAME[name], name)
    assert as_rows(batch) == [("a", 1, None, {"steps": "4"}), ("b, c", None, None, {"steps": "4"})]
    assert len(batch.settings) == 1
    assert batch.digest == read(SAME["b.jsonl"]).digest


def test_a_text_file_is_one_prompt_a_line(read):
    batch = read(b"\xef\xbb\xbfa red circle\r\n\r\n  a blue one\rgreen\n", "prompts.txt")
    assert [(job.line, job.prompt) for job in batch.jobs] == [
        (1, "a red circle"), (3, "a blue one"), (4, "green"),
    ]  # fmt: skip


def test_line_ends_and_a_byte_order_mark_change_nothing(read):
    lines = '{"prompt": "a"}\n{"prompt": "b\u2028c"}\n'
    mixed = "\ufeff" + lines.replace("\n", "\r\n", 1)
    assert read(mixed).digest == read(lines).digest


def test_a_matrix_expands_to_every_combination(read):
    batch = read('{"prompt": ["a", "b"], "seed": "0-2", "steps": [2, 4], "lora": ["x", "y"]}')
    rows = as_rows(batch)
    assert len(rows) == len({repr(row) for row in rows}) == 2 * 3 * 2
    assert [one.values for one in batch.settings] == [
        {"steps": 2, "lora": ["x", "y"]}, {"steps": 4, "lora": ["x", "y"]},
    ]  # fmt: skip


def test_a_list_of_lists_of_loras_expands(read):
    batch = read('{"prompt": "a", "lora": [["x"], ["y", "z"]]}')
    assert [one.values["lora"] for one in batch.settings] == [["x"], ["y", "z"]]


@pytest.mark.parametrize(
    ("seed", "seeds"),
    [('"1,2,5"', [1, 2, 5]), ('["0-1", 7]', [0, 1, 7]), ('3, "num_videos": 2', [3, 4])],
)
def test_seeds_are_spelled_as_for_generate(read, seed, seeds):
    batch = read(f'{{"prompt": "a", "seed": {seed}}}')
    assert [job.seed for job in batch.jobs] == seeds


def test_the_digest_does_not_depend_on_chance(read):
    line = '{"prompt": "a", "seed": [1, "random"]}'
    assert [job.seed for job in read(line).jobs] == [1, None]
    assert read(line).digest == read(line).digest


def test_a_job_without_a_seed_has_the_same_one_in_every_file(read):
    def seeds(content):
        batch = read(content, "b.csv")
        chosen = JobSeeds(batch)
        return [chosen.of(job) for job in batch.jobs]

    one = seeds("prompt,steps\na,1\na,2\na,1\nb,1\n")
    assert len(set(one)) == 4
    assert max(one) < 2**31
    more = seeds("prompt,steps,seed\nc,1,\na,1,\na,2,\na,1,\nb,1,\nb,1,7\n")
    assert more[1:] == [*one, 7]


def test_the_users_own_settings_are_part_of_a_batch(read, tmp_path, monkeypatch):
    monkeypatch.setenv("WANCLI_PRESET_PATH", str(tmp_path))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.setenv("WANCLI_PRESET", "mine")
    (tmp_path / "wancli").mkdir()
    output = "[output]\ncrf = "
    files = [
        ("base", f"{output}1"), ("mine", 'extends = "base"'), ("base", f"{output}2"),
        ("wancli/config", f"{output}3"),
    ]  # fmt: skip
    digests = []
    for name, text in files:
        (tmp_path / f"{name}.toml").write_text(text)
        digests.append(read('{"prompt": "a"}').digest)
    assert len(set(digests)) == len(files)


def test_keys_may_be_spelled_as_any_flag(read):
    batch = read('{"prompt": "a", "num-inference-steps": 2, "--frames": 9}')
    assert batch.settings[0].values == {"steps": 2, "num_frames": 9}


def test_null_unsets_a_default(read):
    lines = '{"defaults": {"size": "8x8"}}\n{"command": "rollout", "prompt": "a", "size": null}'
    assert read(lines).settings[0].values == {}


def test_a_setting_of_true_is_not_a_setting_of_one(read):
    assert len(read('{"prompt": "a", "steps": 1}\n{"prompt": "a", "steps": true}').settings) == 2


@pytest.mark.parametrize(
    ("line", "error", "words", "hint"),
    [
        ('{"prompt": "a", "stepz": 4}', SettingsError, "'stepz' of generate", "'steps'"),
        ('{"prompt": "a", "chunks": 4}', SettingsError, "'chunks'", "a rollout has"),
        ('{"defaults": {"steps": 4}}', SettingsError, "'defaults'", "is the first line"),
        ('{"prompt": "a", "command": "genrate"}', SettingsError, "genrate", "'generate'"),
        ('{"prompt": "a", "command": []}', SettingsError, "unknown command []", "repro"),
        ('{"prompt": " "}', UsageError, "the prompt is empty", "description"),
        ('{"prompt": 5}', SettingsError, "`prompt` 5 is not text", "…"),
        ('{"prompt": "a", "seed": 1.5}', SettingsError, "seed", "`seed 7`"),
        ('{"prompt": "a", "seed": []}', SettingsError, "empty list", "0-3"),
        ('{"prompt": "a", "steps": []}', SettingsError, "empty list", "drop"),
        ('{"prompt": "a", "steps": 1, "--steps": 2}', SettingsError, "twice", "drop"),
        ('{"prompt": "a", "num_videos": 0}', SettingsError, "num_videos 0", "1 to 10000"),
        ('{"prompt": "a", "id": "x"}', UsageError, "that of line 1", "another"),
        ('{"prompt": "a"', UsageError, "not JSON", "JSON lines"),
        ('["a"]', UsageError, "not a JSON object", "JSON lines"),
    ],
)
def test_an_error_names_its_line(read, line, error, words, hint):
    with pytest.raises(error) as caught:
        read(f'{{"prompt": "first", "id": "x"}}\n\n{line}\n')
    assert "b.jsonl:3: " in str(caught.value)
    assert words in str(caught.value)
    assert hint in caught.value.hint


def test_all_wrong_lines_are_named(read):
    lines = '{"prompt": "a"}\n{"prompt":\n{"prompt": "b", "stepz": 3}\n{"prompt": "c"}\n[1]\n'
    with pytest.raises(UsageError, match=r"b.jsonl:2: not JSON.* Wrong, too: lines 3, 5\.$"):
        read(lines)


@pytest.mark.parametrize(
    ("defaults", "words"),
    [
        ({"stepz": 4}, "unknown key 'stepz' of generate."),
        ({"command": "rollout", "chunkz": 4}, "unknown key 'chunkz' of rollout."),
        ({"command": "rolout"}, "unknown command 'rolout'."),
        ({"steps": 4, "--steps": 4}, "the key 'steps' stands twice."),
        ({"size": []}, "`size` is an empty list."),
    ],
)
def test_what_is_wrong_with_the_defaults_is_not_blamed_on_a_job(read, defaults, words):
    tables = "".join(f'"{key}" = {json.dumps(value)}\n' for key, value in defaults.items())
    toml = f'[defaults]\n{tables}[[jobs]]\nprompt = "a"\n'
    lines = f'\n{json.dumps({"defaults": defaults})}\n{{"prompt": "a"}}\n'
    for name, content, where in (("b.toml", toml, "b.toml"), ("b.jsonl", lines, "b.jsonl:2")):
        with pytest.raises(SettingsError) as caught:
            read(content, name)
        assert str(caught.value).endswith(f"{where}: 'defaults': {words}")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("b.jsonl", "", "no jobs"),
        ("b.csv", "prompt,seed\n", "no jobs"),
        ("b.csv", "prompt,prompt\na,b\n", "stands twice"),
        ("b.csv", "prompt,\na,b\n", "no key"),
        ("b.csv", "a red circle,3\nb,4\n", "b.csv:1: 'a red circle' is no key"),
        ("b.csv", "prompt;seed\na;1\n", "not parted by commas"),
        ("b.csv", "prompt\na,b\n", "2 cells under 1 keys"),
        ("b.csv", 'prompt\n"a"b\n', "not CSV"),
        ("b.toml", "[job]\n", "unknown table 'job'"),
        ("b.toml", "jobs = 1\n", "list of tables"),
        ("b.toml", "jobs = [1]\n", "b.toml: job 1: 'jobs' is no table"),
        (
            "b.toml",
            '[[jobs]]\nid = 1\nprompt = "a"\n' * 3,
            "b.toml: job 2: the id '1' is that of job 1, too. Wrong, too: job 3",
        ),
        ("b.txt", b"\xff", "not UTF-8"),
    ],
)
def test_a_broken_file_is_one_error(read, name, content, words):
    with pytest.raises(UsageError, match=words):
        read(content, name)


def test_a_folder_and_a_missing_file_are_errors(tmp_path):
    with pytest.raises(InputError, match="folder"):
        read_jobs(tmp_path, KNOWN)
    with pytest.raises(WancliError, match="not found"):
        read_jobs(tmp_path / "none.jsonl", KNOWN)
