"""Commands of a chat, and the rows and files that they write."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import run_here, write_adapter
from datasets import load_from_disk
from talking import Recorder, recorder

from lit_llama.errors import DataError, ResourceError, UserError
from lit_llama.generate.chat import session
from lit_llama.generate.chat.chat import Chat, Plain
from lit_llama.generate.chat.commands import COMMANDS, take
from lit_llama.generate.chat.session import Answer
from lit_llama.generate.chat.store import Store
from lit_llama.generate.engine.request import Sampling
from lit_llama.generate.flags import Loading
from lit_llama.generate.llm import LLM, load
from lit_llama.generate.models import load_models
from lit_llama.model.kernels.paged import BLOCK
from lit_llama.model.operators.kernels import compiled
from lit_llama.text.prompts.encode import prompt_ids


@pytest.fixture(scope="module")
def loaded(tiny_folder: Path) -> LLM:
    return load(tiny_folder, precision="32-true")


@pytest.fixture
def llm(loaded: LLM) -> Recorder:
    return recorder(loaded)


@pytest.fixture
def chat(llm: Recorder, tmp_path: Path) -> Chat:
    return start({"it": llm}, tmp_path / "store")


def start(models: dict[str, LLM] | dict[str, Recorder], folder: Path | None, tokens: int = 6) -> Chat:
    said: list[str] = []
    chat = Chat(models, Sampling(max_new_tokens=tokens), Store(folder), say=said.append, screen=Plain())
    chat.said = said  # type: ignore[attr-defined]
    return chat


def said(chat: Chat) -> str:
    found: list[str] = chat.said  # type: ignore[attr-defined]
    text = "\n".join(found)
    found.clear()
    return text


def run(chat: Chat, *lines: str) -> str:
    for line in lines:
        take(chat, line)
    return said(chat)


def contents(chat: Chat) -> list[str]:
    return [node.content for node in chat.dialogue.path()]


def test_undo_retry_edit_and_branch_keep_what_was_said(chat: Chat) -> None:
    """An edit or a retry that overwrites the branch it came from."""
    run(chat, "/set temperature 1", "one", "two")
    first = contents(chat)
    run(chat, "/retry")
    assert contents(chat)[:3] == first[:3] and contents(chat)[3] != first[3], "another draw of the same question"
    run(chat, "/edit 1 another one")
    assert contents(chat)[0] == "another one" and len(contents(chat)) == 2
    listed = run(chat, "/branch")
    assert listed.count("messages") == 3 and listed.splitlines()[2].startswith("*")
    run(chat, "/branch 1")
    assert contents(chat) == first
    run(chat, "/undo")
    assert contents(chat) == first[:2]
    run(chat, "/edit 2 As I would have said it")
    assert contents(chat) == ["one", "As I would have said it"] and chat.dialogue.path()[1].trained
    assert contents(start(dict(chat.models), chat.store.folder)) == []
    other = start(dict(chat.models), chat.store.folder)
    run(other, "/switch one")
    assert contents(other) == contents(chat), "all of it is on the disk"


def test_switching_computes_nothing_again(chat: Chat, llm: Recorder) -> None:
    """Conversations that throw each other's prefixes out of the cache."""
    long = "a long message with quite a few words so that it fills blocks of the cache " * 2
    run(chat, "/new first", long, "/new second", "something else altogether", "/switch first")
    before = llm.engine.statistics()
    run(chat, "go on")
    after = llm.engine.statistics()
    whole = len(prompt_ids(llm.tokenizer, llm.require_style(), [n.message() for n in chat.dialogue.path()[:-1]]))
    known = whole - len(prompt_ids(llm.tokenizer, llm.require_style(), [{"role": "user", "content": "go on"}]))
    assert after.reused - before.reused >= known - 2 * BLOCK > BLOCK
    assert after.computed - before.computed < 3 * BLOCK + 12
    assert chat.dialogue.path()[-1].cached_tokens == after.reused - before.reused


def test_names_lists_and_deletes(chat: Chat) -> None:
    """A name that is taken twice, a list in another order than by use, or a deleted conversation that stays."""
    run(chat, "What do llamas eat in the winter, when there is no grass at all anywhere?", "/new", "b", "/rename Bee")
    listed = run(chat, "/list").splitlines()
    assert listed[0].startswith("*  1  Bee  (2 messages") and "What do llamas eat" in listed[1]
    run(chat, "/switch 2")
    assert contents(chat)[0].startswith("What do llamas")
    with pytest.raises(UserError, match="this one is What do"):
        take(chat, "/delete")
    with pytest.raises(UserError, match="already"):
        take(chat, "/rename Bee")
    run(chat, "/delete Bee")
    assert [s.name for s in chat.store.list()] == [chat.dialogue.name]
    assert len(list((chat.store.folder or Path()).glob("*.jsonl"))) == 1


def test_settings_are_of_a_conversation_and_are_checked(chat: Chat, llm: Recorder) -> None:
    """A setting that reaches other conversations, that is lost at the next start, or that breaks every later turn."""
    run(chat, "/set max_new_tokens 2", "/set stop ###", "x", "/set seed 7")
    assert chat.dialogue.path()[-1].tokens == 2
    assert chat.sampling == Sampling(max_new_tokens=2, stop=("###",), seed=7)
    for wrong in ("/set temperature hot", "/set top_p 2", "/set colour red", "/set max_new_tokens 1.5"):
        with pytest.raises(UserError):
            take(chat, wrong)
    assert chat.sampling == Sampling(max_new_tokens=2, stop=("###",), seed=7)
    run(chat, "/set stop", "/set seed")
    assert chat.sampling == Sampling(max_new_tokens=2)
    assert "max_new_tokens 2  (of this conversation)" in run(chat, "/set")
    run(chat, "/new")
    assert chat.sampling == Sampling(max_new_tokens=6)


def test_a_message_that_is_refused_leaves_no_conversation(chat: Chat) -> None:
    """An empty conversation for every paste that is too long."""
    with pytest.raises(UserError, match="tokens, but only 250 fit"):
        take(chat, "many words " * 100)
    assert chat.store.list() == [] and chat.id is None


def test_a_killed_answer_is_kept_as_far_as_it_came(chat: Chat, monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer that reaches the disk only when it has ended."""
    monkeypatch.setattr(session, "_FLUSH_SECONDS", 0.0)
    folder = chat.store.folder
    id = chat.store.create("killed")
    answer = Answer(chat.store, id, chat.llm, Sampling(max_new_tokens=20), text="go", parent=0)
    pieces = iter(answer)
    seen = next(piece for piece in pieces if piece)
    node = Store(folder).get(id).nodes[2]  # as another process finds it after a kill
    assert node.content == seen and seen and node.finish_reason is None and not node.trained


def test_a_full_disk_is_told_behind_the_answer(chat: Chat, monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer that is cut short, or earlier messages that are lost, as the disk is full."""
    run(chat, "one")
    before = contents(chat)
    free = chat.store.write

    def full(*_: object, **__: object) -> None:
        raise ResourceError("the disk is full")

    monkeypatch.setattr(session, "_FLUSH_SECONDS", 0.0)
    monkeypatch.setattr(chat.store, "write", full)
    with pytest.raises(ResourceError, match="the disk is full"):
        take(chat, "two")
    assert chat.answer is not None and chat.answer.tokens > 1 and chat.answer.text
    monkeypatch.setattr(chat.store, "write", free)
    assert contents(chat)[:2] == before
    run(chat, "three")
    assert contents(chat)[-2] == "three"


def trained_texts(data: Path, llm: LLM) -> list[str]:
    """What is learned of each row, decoded."""
    rows = load_from_disk(str(data))["train"]
    return [llm.tokenizer.decode([i for i in row["labels"] if i != -100]) for row in rows]


def test_exported_rows_are_prepared_with_the_turns_that_are_trained(
    chat: Chat, llm: Recorder, tiny_folder: Path, tmp_path: Path
) -> None:
    """Rows that prepare/records.py reads otherwise: stopped answers that are learned, or marks that it ignores."""
    file = tmp_path / "rows.jsonl"
    with pytest.raises(UserError, match="no messages yet"):
        take(chat, f"/export {file}")
    run(chat, "/system Be brief", "one", "two", "three", "four")  # all cut off, so that none is learned
    with pytest.raises(UserError, match="no answer is to be learned"):
        take(chat, f"/export {file}")
    run(chat, "/train 3", "/train 7 on", "/train 7 off", "/edit 9 Fine.", f"/export {file}")
    run(chat, "/new", "other", "/edit 2 Yes.", f"/export {file}")
    first, second = map(json.loads, file.read_text("utf-8").splitlines())
    assert [m["role"] for m in first["messages"]] == ["system", *["user", "assistant"] * 4]
    assert [m.get("train", True) for m in first["messages"]] == [True, True, True, True, False, True, False, True, True]
    assert second == {"messages": [{"role": "user", "content": "other"}, {"role": "assistant", "content": "Yes."}]}
    flags = ["--source", file, "--destination_path", tmp_path / "data", "--tokenizer_path", tiny_folder]
    done = run_here("prepare/records.py", *flags, "--test_split_size", 0)
    assert done.returncode == 0, done.stderr
    assert trained_texts(tmp_path / "data", llm) == [first["messages"][2]["content"] + "Fine.", "Yes."]


def test_a_file_that_cannot_be_written_is_a_remark(chat: Chat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A chat that a wrong name of a file ends."""
    run(chat, "one")

    def full(*_: object) -> None:
        raise PermissionError(13, "Permission denied", "there")

    monkeypatch.setattr("lit_llama.generate.chat.rows.write_json_lines", full)
    with pytest.raises(ResourceError, match=r"^/save .*: there: Permission denied; name another file"):
        take(chat, f"/save {tmp_path / 'file.jsonl'}")


def test_what_is_saved_is_loaded_with_all_branches(chat: Chat, tmp_path: Path) -> None:
    """A file that holds the branch in use alone."""
    run(chat, "one", "two", "/edit 1 other", "/set seed 3", f"/save {tmp_path / 'file.jsonl'}")
    before = chat.dialogue
    with pytest.raises(UserError, match="is there already"):
        take(chat, f"/save {tmp_path / 'file.jsonl'}")
    run(chat, f"/load {tmp_path / 'file.jsonl'}")
    after = chat.dialogue
    assert after.id != before.id and after.name == f"{before.name} 2"
    assert (after.nodes, after.heads, after.settings) == (before.nodes, before.heads, before.settings)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "holds neither a saved conversation nor rows"),
        ("hello\n", "holds neither a saved conversation nor rows"),
        ('{"prompt": "x"}\n', "line 1 has no messages"),
        ('{"messages": [{"role": "user", "content": "x"}]}\n{"messages": [{"role": "robot", "content": "x"}]}\n',
         "line 2 messages[0]: role is 'robot'"),
        ('{"messages": [{"role": "user", "content": 5}]}\n', "content is 5, expected text"),
        ('{"messages": [{"role": "assistant", "content": "x"}]}\n', "role is 'assistant' behind 'nothing'"),
        ('{"messages": [{"role": "user", "content": "x", "tool_calls": []}]}\n', "field 'tool_calls' has no place"),
        ('{"type": "dialogue", "format": 1, "id": "x", "name": "n", "time": 0}\n{"type": "head", "id": 7}\n',
         "line 2 id is 7"),
        ('{"type": "dialogue", "format": 9, "id": "x"}\n', "format 9"),
    ],
)  # fmt: skip
def test_files_of_another_kind_are_named_with_their_place(chat: Chat, tmp_path: Path, text: str, told: str) -> None:
    """A traceback, or half a conversation."""
    path = tmp_path / "other.jsonl"
    path.write_text(text)
    with pytest.raises(DataError) as error:
        take(chat, f"/load {path}")
    assert told in str(error.value) and str(path) in str(error.value) and chat.store.list() == []


def test_rows_of_messages_are_loaded(chat: Chat, tmp_path: Path) -> None:
    """Rows that only this program wrote."""
    rows = [{"messages": [{"role": "user", "content": t}, {"role": "assistant", "content": "a"}]} for t in "xy"]
    (tmp_path / "rows.json").write_text(json.dumps(rows, indent=1))
    run(chat, f"/load {tmp_path / 'rows.json'}")
    assert contents(chat) == ["y", "a"] and {s.name for s in chat.store.list()} == {"rows", "rows 2"}


def test_every_command_says_something_sensible_before_the_first_message(chat: Chat) -> None:
    """A traceback in a conversation that is not there yet."""
    for name in COMMANDS:
        for words in ("", " 1", " 1 x", " /nowhere/x"):
            try:
                take(chat, name + words)
            except UserError as error:
                assert str(error)


@pytest.fixture
def family(tiny_folder: Path, tmp_path: Path) -> Iterator[dict[str, LLM]]:
    if compiled() is None:
        pytest.skip("no compiler for the kernels")
    own = write_adapter(tmp_path / "own", tiny_folder, style="chatml", seed=1)
    other = write_adapter(tmp_path / "other", tiny_folder, seed=2)
    yield load_models(own, {"friend": other}, Loading(precision="32-true"))


def test_models_of_one_engine_answer_as_each_would_alone(
    family: dict[str, LLM], tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An adapter that answers in place of another or of the base, or in the style of another."""
    assert list(family) == ["own", tiny_folder.name, "friend"]
    chat = start(family, None, tokens=8)
    found = {}
    for name in family:
        run(chat, "/new", f"/model {name}", "Say something")
        found[name] = contents(chat)[-1]
        assert chat.dialogue.path()[-1].model == name
    for name, folder in {"own": tmp_path / "own", tiny_folder.name: tiny_folder, "friend": tmp_path / "other"}.items():
        alone = start({"it": load(folder, precision="32-true")}, None, tokens=8)
        run(alone, "Say something")
        assert contents(alone)[-1] == found[name]
    assert len(set(found.values())) == 3 and family["friend"].style is not family["own"].style
    assert run(chat, "/model").splitlines()[2] == "* friend"
    with pytest.raises(UserError, match="there is no model 'x'"):
        take(chat, "/model x")


def test_models_that_cannot_share_an_engine_are_refused_by_name(tiny_folder: Path, tmp_path: Path) -> None:
    """Embeddings of an adapter that are left out in silence, or a name that hides the base."""
    if compiled() is None:
        pytest.skip("no compiler for the kernels")
    whole = write_adapter(tmp_path / "whole", tiny_folder, targets=["q_proj", "embed_tokens"])
    assert list(load_models(whole, None, Loading(precision="32-true"))) == ["whole"]
    with pytest.raises(UserError, match=r"adapter a: .*whole holds more than updates of low rank"):
        load_models(tiny_folder, {"a": whole}, Loading(precision="32-true"))
    plain = write_adapter(tmp_path / "plain", tiny_folder)
    with pytest.raises(UserError, match="is the name of the base already"):
        load_models(tiny_folder, {tiny_folder.name: plain}, Loading(precision="32-true"))
    with pytest.raises(UserError, match="is a model and no adapter"):
        load_models(tiny_folder, {"a": tiny_folder}, Loading(precision="32-true"))
