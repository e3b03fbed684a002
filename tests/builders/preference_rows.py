"""Builds rows of preference data, valid and invalid."""

import json

from hypothesis import strategies as st

from svc.dataset.schema.example import Role
from tests.svc.chats import turn
from tests.svc.json_values import json_values

QUESTION, BETTER, WORSE = "Name a red fruit.", "A cherry.", "Bananas are yellow."
ASKED, GOOD, BAD = turn("user", QUESTION), turn("assistant", BETTER), turn("assistant", WORSE)
turns = st.lists(
    st.fixed_dictionaries(
        {},
        optional={
            "role": st.sampled_from([*Role]) | json_values,
            "from": st.sampled_from(["human", "gpt", "function_call"]) | json_values,
            "content": st.text(max_size=5) | json_values,
            "value": st.text(max_size=5) | json_values,
        },
    )
    | st.sampled_from([ASKED, GOOD, BAD])
    | json_values,
    max_size=4,
)
hh = st.lists(st.sampled_from(["\n\nHuman:", "\n\nAssistant:", " text"]), max_size=6).map("".join)
values = turns | st.sampled_from([ASKED, GOOD, BAD]) | hh | st.text(max_size=5) | json_values | turns.map(json.dumps)
keys = ("prompt", "question", "instruction", "conversations", "messages", "system", "tools", "history", "input")
rows = st.fixed_dictionaries(
    {},
    optional={
        **dict.fromkeys(keys, values),
        **dict.fromkeys(["chosen", "rejected", "preferred_output", "non_preferred_output"], values),
        "input": values | st.fixed_dictionaries({"messages": values}, optional={"tools": values}),
        "label": st.booleans() | values,
    },
)
