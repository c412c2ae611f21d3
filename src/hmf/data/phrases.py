# SPDX-License-Identifier: Apache-2.0
"""Words and phrases of the generated tasks."""

from dataclasses import dataclass
from random import Random
from typing import Any

_SYLLABLES = [consonant + vowel for consonant in "bdfghjklmnprstvz" for vowel in "aeiou"]


def word(rng: Random) -> str:
    """A made-up word of three syllables, one of half a million; no word is a prefix of another."""
    return "".join(rng.choices(_SYLLABLES, k=3))


def value(rng: Random, numeric: float = 0.5) -> str:
    """The value of a key or name: two to four digits with probability `numeric`, else a word of two syllables."""
    if rng.random() < numeric:
        digits = rng.randint(2, 4)
        return str(rng.randrange(10 ** (digits - 1), 10**digits))
    return "".join(rng.choices(_SYLLABLES, k=2))


# Line of a pair, question.
RECALL = [
    ("{key}: {value}", "What is the value of {key}?"),
    ("{key} = {value}", "Give the value of {key}."),
    ("{key} is {value}", "What is {key}?"),
    ("The code of {key} is {value}.", "What is the code of {key}?"),
    ("{key} -> {value}", "Where does {key} lead?"),
]
RECALL_LEAD = ["Remember these pairs.", "Here is a list:", "Read this table.", "Keep this in mind:"]
# Statement, question.
NEEDLE = [
    ("The secret code of {name} is {value}.", "What is the secret code of {name}?"),
    ("# Note: the password of {name} is {value}.", "What is the password of {name}?"),
    ("{name} lives in room {value}.", "In which room does {name} live?"),
    ("The favourite word of {name} is {value}.", "What is the favourite word of {name}?"),
]
ARITHMETIC = [
    "What is {problem}?",
    "{problem} =",
    "Compute {problem}.",
    "How much is {problem}?",
    "Calculate {problem}",
]
SYSTEM = ["You are a helpful assistant.", "Answer briefly.", "You are a careful assistant.", "Be kind and short."]

# Ways to ask, reasoning, answer.
CHAT: list[tuple[list[str], str, str]] = [
    (["Hello!", "Hi", "Hello", "Hi there!", "Hey"], "A greeting. I greet back.", "Hello! How can I help you?"),
    (
        ["Good morning!", "Good evening!", "Good day"],
        "A greeting. I greet back.",
        "Good day to you! What can I do for you?",
    ),
    (["How are you?", "How do you do?", "Are you well?"], "A polite question.", "I am well, thank you. And you?"),
    (["Thank you!", "Thanks!", "Thanks a lot"], "They thank me.", "You are welcome."),
    (["Goodbye!", "Bye", "See you later"], "They leave.", "Goodbye, and have a nice day."),
    (
        ["Who are you?", "What are you?", "Tell me about yourself."],
        "They ask what I am.",
        "I am a very small language model, made to test hybrid models.",
    ),
    (
        ["What can you do?", "What are your skills?", "How can you help me?"],
        "They ask about my abilities.",
        "I can recall pairs, find a note in a long text, do small sums and call tools.",
    ),
    (["Tell me a joke.", "Do you know a joke?"], "A joke, then.", "Why was the list so calm? It had no pop."),
    (["What is Python?", "Explain Python."], "Python is a language.", "Python is a programming language."),
    (
        [
            "What is Linear Attention in the context of LLMs?",
            "What is linear attention in the context of LLMs?",
            "What is linear attention?",
            "Explain linear attention.",
        ],
        "Attention with a state in place of a cache.",
        "Linear attention keeps a state of fixed size in place of a cache that grows, so each token costs the same.",
    ),
    (
        ["What is attention?", "Explain attention in a Transformer."],
        "Queries, keys and values.",
        "Attention lets each token look at the earlier tokens and take what fits its query.",
    ),
    (
        ["What is a state space model?", "What is a state-space layer?"],
        "A recurrent layer.",
        "A state-space layer carries a state of fixed size from token to token.",
    ),
    (
        ["What is a hybrid model?", "Explain hybrid models."],
        "Attention and state-space layers together.",
        "A hybrid model mixes attention layers with state-space layers: less memory, nearly the same answers.",
    ),
    (
        ["What is Gated DeltaNet?", "Explain Gated DeltaNet."],
        "A gate and the delta rule.",
        "Gated DeltaNet is a state-space layer that forgets by a gate and corrects its memory by the delta rule.",
    ),
    (
        ["What is a KV cache?", "Explain the KV cache."],
        "Keys and values are kept.",
        "The KV cache keeps the keys and values of earlier tokens, so it grows with the text.",
    ),
    (
        ["What is the meaning of life?", "Why are we here?"],
        "A large question for a small model.",
        "That is a large question for a small model. Be kind.",
    ),
]

_NAMES = ["city", "name", "title", "place", "person", "topic", "file", "item", "user", "color"]
_COUNTS = ["count", "size", "amount", "limit", "number", "days", "minutes", "level"]
_VERBS = ["find", "open", "close", "book", "delete", "create", "update", "check", "send", "start", "stop", "show"]
_NOUNS = ["room", "ticket", "order", "file", "account", "lamp", "report", "song", "event", "task", "note", "device"]
# Name, description, parameters (name: type), ways to ask.
_FAMILIAR: list[tuple[str, str, dict[str, str], list[str]]] = [
    (
        "get_weather",
        "Get the weather of a city.",
        {"city": "string"},
        ["What is the weather in {city}?", "How is the weather in {city} today?", "Weather in {city}, please."],
    ),
    (
        "get_weather",
        "Get the current weather for a location.",
        {"location": "string"},
        [
            "What is the weather in {location}?",
            "What's the weather like in {location}?",
            "Is it raining in {location}?",
        ],
    ),
    (
        "get_time",
        "Get the time in a city.",
        {"city": "string"},
        ["What time is it in {city}?", "Tell me the time in {city}."],
    ),
    (
        "add",
        "Add two numbers.",
        {"a": "integer", "b": "integer"},
        ["Use the tool to add {a} and {b}.", "Add {a} to {b}."],
    ),
    (
        "convert_currency",
        "Convert an amount of money.",
        {"amount": "integer", "target": "string"},
        ["Convert {amount} to {target}.", "How much is {amount} in {target}?"],
    ),
    (
        "send_email",
        "Send an email.",
        {"to": "string", "subject": "string"},
        ["Send an email to {to} about {subject}.", "Write to {to} with the subject {subject}."],
    ),
    (
        "set_timer",
        "Set a timer.",
        {"minutes": "integer"},
        ["Set a timer for {minutes} minutes.", "Wake me in {minutes} minutes."],
    ),
    (
        "search",
        "Search the web.",
        {"query": "string"},
        ["Search the web for {query}.", "Look up {query}.", "Find something about {query}."],
    ),
]
_CITIES = ["Paris", "London", "Berlin", "Tokyo", "Rome", "Madrid", "Vienna", "Oslo", "Boston", "Delhi", "San Francisco"]


@dataclass(frozen=True)
class Tool:
    """A function that the model may call, and how people ask for it."""

    name: str
    description: str
    parameters: dict[str, str]  # name: JSON type
    requests: list[str]
    described: bool = False  # whether each parameter has a description too

    def schema(self) -> dict[str, Any]:
        """The tool as OpenAI clients send it."""
        properties = {
            name: {"type": kind, "description": f"The {name}."} if self.described else {"type": kind}
            for name, kind in self.parameters.items()
        }
        parameters = {"type": "object", "properties": properties, "required": list(self.parameters)}
        function = {"name": self.name, "description": self.description, "parameters": parameters}
        return {"type": "function", "function": function}

    def request(self, rng: Random) -> tuple[str, dict[str, Any]]:
        """What a user says, and the arguments that fit."""
        arguments: dict[str, Any] = {}
        for name, kind in self.parameters.items():
            if kind == "integer":
                arguments[name] = int(value(rng, numeric=1)) if rng.random() < 0.7 else rng.randrange(10)
            else:
                arguments[name] = rng.choice(_CITIES) if rng.random() < 0.2 else _spelled(rng)
        return rng.choice(self.requests).format(**arguments), arguments


def tool(rng: Random) -> Tool:
    """A familiar tool, or one of a made-up name: calls must be copied from the system turn, not learned by heart."""
    described = rng.random() < 0.3
    if rng.random() < 0.4:
        name, description, parameters, requests = rng.choice(_FAMILIAR)
        return Tool(name, description, parameters, requests, described)
    verb = rng.choice(_VERBS) if rng.random() < 0.6 else word(rng)
    noun = rng.choice(_NOUNS) if rng.random() < 0.6 else word(rng)
    parameters = {}
    if rng.random() < 0.7:
        parameters[rng.choice(_NAMES) if rng.random() < 0.7 else word(rng)] = "string"
    if not parameters or rng.random() < 0.4:
        parameters[rng.choice(_COUNTS) if rng.random() < 0.7 else word(rng)] = "integer"
    slots = " and ".join(f"{name} {{{name}}}" for name in parameters)
    requests = [f"Please {verb} the {noun} with {slots}.", f"{verb.capitalize()} a {noun}, {slots}."]
    return Tool(f"{verb}_{noun}", f"{verb.capitalize()} a {noun}.", parameters, requests, described)


def _spelled(rng: Random) -> str:
    text = word(rng)
    return text.capitalize() if rng.random() < 0.6 else text
