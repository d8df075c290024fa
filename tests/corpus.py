"""What an upstream may say: scripts for the emulator, and what the client asks for beside them."""

from typing import Any

LOOKUP = {"name": "lookup", "arguments": {"city": "Zürich", "days": [1, 2, 3]}}
CORPUS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({"chunks": 12}, {}),
    "unicode": ({"text": ["ü", "😀", "日本", "\u2028", '"', "\\", "\n", "e", "\u0301"]}, {}),
    "an emoji split over two chunks": ({"text": ["so ", "\ud83d", "\ude00", "!"]}, {}),
    "reasoning": ({"reasoning": "Zürich lies so far east", "chunks": 3}, {}),
    "a tool call in pieces": ({"tool_calls": [LOOKUP]}, {}),
    "parallel tools": ({"tool_calls": [LOOKUP, {**LOOKUP, "name": "other", "id": "x"}]}, {}),
    "n = 3": ({"chunks": 5}, {"n": 3}),
    "logprobs": ({"chunks": 5}, {"logprobs": True, "top_logprobs": 2}),
    "a refusal": ({"refusal": "I cannot help with that."}, {}),
    "stopped by the filter": ({"chunks": 3, "finish_reason": "content_filter"}, {}),
    "stopped by length": ({"chunks": 3, "finish_reason": "length"}, {}),
    "a late filter that annotates": ({"chunks": 4, "late_filter": "annotations"}, {}),
    "a late filter that blocks": ({"chunks": 4, "late_filter": "blocked"}, {}),
    "usage": ({"chunks": 3}, {"stream_options": {"include_usage": True}}),
    "empty": ({"empty": True}, {}),
    "4,000 chunks": ({"chunks": 4000}, {}),
}
"""Name -> (fields of emulator.script.Script, further fields of the request)."""
