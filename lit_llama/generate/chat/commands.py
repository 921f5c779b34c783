"""Commands of a chat: what stands behind a slash."""

import json
import time
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from lit_llama.errors import ResourceError, UserError
from lit_llama.generate.chat import rows
from lit_llama.generate.chat.chat import Chat
from lit_llama.generate.chat.dialogue import Dialogue, Node
from lit_llama.generate.chat.session import SETTINGS, add_system, check_settings, check_system, message
from lit_llama.generate.engine.request import Sampling
from lit_llama.wording import call


def parse_setting(name: str, text: str) -> Any:
    """Return the value of a setting as it is kept; None where there is no text.

    `stop` is a list in JSON, or one text.

    Raises:
        UserError: There is no such setting, or the text is none of its values.
    """
    if name not in SETTINGS:
        raise UserError(f"there is no setting {name!r}; there are: {', '.join(SETTINGS)}")
    if not text:
        return None
    kind = get_type_hints(Sampling)[name]
    if get_origin(kind) is types.UnionType:
        kind = get_args(kind)[0]
    if kind in (int, float):
        try:
            return kind(text)
        except ValueError as error:
            expected = "an integer" if kind is int else "a number"
            raise UserError(f"{name} is {text!r}, expected {expected}") from error
    try:
        value = json.loads(text)
    except ValueError:
        return [text]
    return value if isinstance(value, list) else [text]


class Leave(Exception):
    """Wish of the user to leave."""


@dataclass(frozen=True)
class Command:
    """Command that a word behind a slash starts.

    Attributes:
        name: The word.
        takes: What follows it, for people.
        does: For people.
        run: Does it.
    """

    name: str
    takes: str
    does: str
    run: Callable[[Chat, str], None]


def take(chat: Chat, line: str) -> None:
    """Do what a line says.

    Raises:
        UserError: It cannot be done; the conversation is as it was.
        ResourceError: A file cannot be written.
        Leave: The user wants to leave.
    """
    word, _, rest = line.partition(" ")
    try:
        if not line.startswith("/"):
            chat.ask(line)
        elif word in ("/quit", "/exit"):
            raise Leave
        elif (command := COMMANDS.get(word)) is not None:
            command.run(chat, rest.strip())
        else:
            raise UserError(f"unknown command {line}; {HELP}")
    except OSError as error:  # of a file that a command names; the talk goes on
        place = error.filename2 or error.filename or "a file"
        raise ResourceError(f"{word} {rest.strip()}: {place}: {error.strerror}; name another file") from error
    finally:
        for remark in chat.store.remarks[chat.told :]:
            chat.say(remark)
        chat.told = len(chat.store.remarks)


def _new(chat: Chat, name: str) -> None:
    chat.id, chat.pending, chat.own = None, chat.system, {}
    if name:
        chat.create(name)


def _list(chat: Chat, _: str) -> None:
    found = chat.store.list()
    for number, summary in enumerate(found, 1):
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(summary.changed))
        mark = "*" if summary.id == chat.id else " "
        chat.say(f"{mark}{number:>3}  {summary.name}  ({summary.messages} messages, {when})")
    if not found:
        chat.say("no conversations yet")


def _found(chat: Chat, name: str) -> str:
    summary = chat.store.find(name)
    if summary is None:
        raise UserError(f"there is no one conversation {name!r}; /list shows them")
    return summary.id


def _switch(chat: Chat, name: str) -> None:
    chat.id = _found(chat, name)
    chat.own = {}
    wanted = chat.settings.get("model")
    if wanted is not None and wanted not in chat.models:
        chat.say(f"(its model {wanted!r} is not there: {chat.model} answers)")
    chat.say(chat.status())
    _list_path(chat, chat.dialogue.path()[-2:])


def _rename(chat: Chat, name: str) -> None:
    chat.store.rename(_kept(chat), name)


def _delete(chat: Chat, name: str) -> None:
    if not name:
        raise UserError(f"/delete takes the name of a conversation; this one is {chat.dialogue.name}")
    id = _found(chat, name)
    gone = chat.store.get(id).name
    chat.store.delete(id)
    if id == chat.id:
        _new(chat, "")
    chat.say(f"deleted {gone}")


def _kept(chat: Chat) -> str:
    if chat.id is None:
        raise UserError("the conversation has no messages yet")
    return chat.id


def _undo(chat: Chat, _: str) -> None:
    path = chat.dialogue.path()
    asked = next((node for node in reversed(path) if node.role == "user"), None)
    if asked is None:
        raise UserError("there is nothing to be taken back")
    chat.store.write(_kept(chat), {"type": "head", "id": asked.parent})
    chat.say(f"taken back: {asked.content[:60]!r}; /branch brings it back")


def _retry(chat: Chat, _: str) -> None:
    asked = next((node for node in reversed(chat.dialogue.path()) if node.role == "user"), None)
    if asked is None:
        raise UserError("there is nothing to be answered again")
    if chat.sampling.greedy:
        chat.say("(temperature 0 gives the same answer again; /set temperature 0.8 draws others)")
    chat.make(None, asked.id)


def _edited(chat: Chat, arguments: str) -> None:
    number, _, text = arguments.partition(" ")
    node = _node(chat, number)
    if not text:
        if chat.edit is None:
            raise UserError("/edit takes the number of a message and its new text")
        text = chat.edit(node.content)
    if not text.strip() or text == node.content:
        chat.say("nothing was changed")
    elif node.role == "user":
        chat.make(text, node.parent)
    elif node.role == "system":
        _system(chat, text)
    else:
        _replace(chat, node, text)


def _replace(chat: Chat, node: Node, text: str) -> None:
    """Put another answer in the place of one, as a branch of its own."""

    def make(dialogue: Dialogue) -> list[dict[str, Any]]:
        id = dialogue.next_id
        said = message(id, node.parent, "assistant", text, time.time())
        return [said, {"type": "end", "id": id, "finish_reason": "stop"}]

    chat.store.change(_kept(chat), make)


def _node(chat: Chat, number: str) -> Node:
    path = chat.dialogue.path()
    if not number.isdecimal() or not 1 <= int(number) <= len(path):
        raise UserError(f"{number!r} is no message; /show numbers them from 1 to {len(path)}")
    return path[int(number) - 1]


def _branch(chat: Chat, number: str) -> None:
    dialogue = chat.dialogue
    leaves = rows.branches(dialogue)
    if number:
        if not number.isdecimal() or not 1 <= int(number) <= len(leaves):
            raise UserError(f"{number!r} is no branch; /branch numbers them from 1 to {len(leaves)}")
        chat.store.write(_kept(chat), {"type": "head", "id": leaves[int(number) - 1]})
        return
    for index, leaf in enumerate(leaves, 1):
        path = dialogue.path(leaf)
        mark = "*" if leaf == dialogue.heads[0] else " "
        last = " ".join(path[-1].content.split())[:60]
        chat.say(f"{mark}{index:>3}  {len(path)} messages, {path[-1].role}: {last}")
    if not leaves:
        chat.say("no branches yet")


def _system(chat: Chat, text: str) -> None:
    if not text:
        path = chat.dialogue.path()
        now = path[0].content if path and path[0].role == "system" else "" if path else chat.pending
        chat.say(f"system message: {now}" if now else "no system message")
        return
    check_system(chat.llm, text)
    if chat.id is None:
        chat.pending = text
    else:
        add_system(chat.store, chat.id, text)
        chat.say("(the conversation starts over with it; /branch brings back what was said)")


def _set(chat: Chat, arguments: str) -> None:
    name, _, text = arguments.partition(" ")
    if not name:
        sampling = chat.sampling
        for setting in SETTINGS:
            own = "  (of this conversation)" if setting in chat.settings else ""
            chat.say(f"{setting} {getattr(sampling, setting)!r}{own}")
        return
    value = parse_setting(name, text.strip())
    _keep_setting(chat, name, value)


def _keep_setting(chat: Chat, name: str, value: Any) -> None:
    if name != "model" and value is not None:
        check_settings(chat.default, {**chat.settings, name: value} | {})
    if chat.id is None:
        chat.own = {k: v for k, v in {**chat.own, name: value}.items() if v is not None}
    else:
        chat.store.write(chat.id, {"type": "set", "name": name, "value": value})


def _choose(chat: Chat, name: str) -> None:
    if not name:
        for model in chat.models:
            chat.say(f"{'*' if model == chat.model else ' '} {model}")
        return
    if name not in chat.models:
        raise UserError(f"there is no model {name!r}; there are: {', '.join(chat.models)}")
    _keep_setting(chat, "model", name)


def _show_path(chat: Chat, number: str) -> None:
    if number:
        node = _node(chat, number)
        chat.say(_headline(chat, int(number), node))
        chat.say(node.content)
        return
    path = chat.dialogue.path()
    _list_path(chat, path)
    if not path:
        chat.say("no messages yet")


def _list_path(chat: Chat, nodes: Sequence[Node]) -> None:
    path = chat.dialogue.path()
    numbers = {node.id: number for number, node in enumerate(path, 1)}
    for node in nodes:
        chat.say(_headline(chat, numbers[node.id], node))
        chat.screen.show(node.content, node.opened)


def _headline(chat: Chat, number: int, node: Node) -> str:
    siblings = [other.id for other in chat.dialogue.siblings(node.id)]
    which = f", {siblings.index(node.id) + 1} of {len(siblings)} branches" if len(siblings) > 1 else ""
    if node.role != "assistant":
        return f"{number}. {node.role}{which}"
    ends = {"length": ", cut off", "abort": ", stopped", "error": ", failed", None: ", interrupted"}
    trained = "" if node.trained else ", not trained on"
    return f"{number}. {node.model or 'assistant'}{ends.get(node.finish_reason, '')}{which}{trained}"


def _train(chat: Chat, arguments: str) -> None:
    number, _, word = arguments.partition(" ")
    node = _node(chat, number)
    if node.role != "assistant" or word not in ("", "on", "off"):
        raise UserError("/train takes the number of an answer, and on or off")
    chat.store.write(_kept(chat), {"type": "train", "id": node.id, "train": word != "off"})


def _save(chat: Chat, file: str) -> None:
    if not file:
        raise UserError("/save takes the file to write")
    rows.save(Path(file).expanduser(), chat.store.get(_kept(chat)))
    chat.say(f"saved to {file}")


def _load(chat: Chat, file: str) -> None:
    if not file:
        raise UserError("/load takes the file to read")
    ids = chat.store.load(rows.load(Path(file).expanduser()))
    chat.id = ids[-1] if ids else chat.id
    chat.say(chat.status())


def _export(chat: Chat, arguments: str) -> None:
    file, _, which = arguments.rpartition(" ") if arguments.endswith(" all") else (arguments, "", "")
    if not file:
        raise UserError("/export takes the file to write, and `all` for all conversations")
    ids = [summary.id for summary in chat.store.list()] if which else [_kept(chat)]
    count = rows.export(Path(file).expanduser(), map(chat.store.get, ids))
    chat.say(f"{count} rows added to {file}; {call('prepare')} reads them")


def _help(chat: Chat, _: str) -> None:
    for command in COMMANDS.values():
        chat.say(f"{command.name} {command.takes}".ljust(26) + command.does)
    chat.say("/quit or Ctrl-D leaves; Ctrl-C stops an answer, and what there is of it is kept")


_ALL = (
    Command("/new", "[NAME]", "begins a conversation", _new),
    Command("/list", "", "shows all conversations", _list),
    Command("/switch", "NAME or NUMBER", "goes on with another one", _switch),
    Command("/rename", "NAME", "renames this one", _rename),
    Command("/delete", "NAME or NUMBER", "removes one from the disk", _delete),
    Command("/undo", "", "takes the last message and its answer back", _undo),
    Command("/retry", "", "answers the last message again", _retry),
    Command("/edit", "N [TEXT]", "changes message N on a branch of its own; one of yours is answered", _edited),
    Command("/branch", "[N]", "shows the branches, or goes to one", _branch),
    Command("/system", "[TEXT]", "starts over with a system message", _system),
    Command("/set", "[NAME [VALUE]]", "changes how this conversation is sampled; without VALUE as at first", _set),
    Command("/model", "[NAME]", "shows the models, or chooses one", _choose),
    Command("/show", "[N]", "shows the conversation, or message N with its thoughts", _show_path),
    Command("/train", "N [on|off]", "says whether answer N is to be learned", _train),
    Command("/export", "FILE [all]", "adds the branch, or that of all conversations, to training rows", _export),
    Command("/save", "FILE", "writes this conversation with all its branches", _save),
    Command("/load", "FILE", "reads a saved conversation, or rows of messages", _load),
    Command("/help", "", "shows this", _help),
)
COMMANDS = {command.name: command for command in _ALL}
HELP = "/help lists the commands, /quit or Ctrl-D leaves, Ctrl-C stops an answer"
