"""The formats of strings in JSON schemas, as regular expressions that let through valid texts only.

Some take in less than the format does: a host name's labels have 32 characters at most, and what is allowed in any
language is written in ASCII. Formats that JSON Schema does not define and that are not here are annotations.
"""

from __future__ import annotations

_DAY = r"(\d{4}-(0[13578]|1[02])-(0[1-9]|[12]\d|3[01])|\d{4}-(0[469]|11)-(0[1-9]|[12]\d|30)|\d{4}-02-(0[1-9]|1\d|2[0-8])"
_LEAP_DAY = r"|(\d\d(0[48]|[2468][048]|[13579][26])|([02468][048]|[13579][26])00)-02-29)"
_TIME = r"([01]\d|2[0-3]):[0-5]\d:[0-5]\d(\.\d{1,9})?(Z|[+-]([01]\d|2[0-3]):[0-5]\d)"
_BYTE = r"(25[0-5]|2[0-4]\d|1\d\d|[1-9]?\d)"
_LABEL = r"[A-Za-z0-9]([A-Za-z0-9-]{0,30}[A-Za-z0-9])?"
_HEX = "[0-9a-fA-F]"
_GROUP = f"{_HEX}{{1,4}}"
_IPV6 = [f"({_GROUP}:){{7}}{_GROUP}", *(f"({_GROUP}:){{{n}}}(:{_GROUP}){{1,{7 - n}}}" for n in range(1, 7))]
_N = r"\d{1,4}"
_DURATION_TIME = f"T({_N}H({_N}M({_N}S)?)?|{_N}M({_N}S)?|{_N}S)"
_DURATION_DAYS = f"({_N}D|{_N}M({_N}D)?|{_N}Y({_N}M({_N}D)?)?)"
_URI_CHARACTER = r"[A-Za-z0-9._~!$&'()*+,;=:@-]"
_POINTER = r"(/([^~/]|~[01])*)*"
_NETWORK = "|".join(rf"{_BYTE}(\.{_BYTE}){{{n - 1}}}(\.0){{{4 - n}}}/{8 * n}" for n in range(1, 5))


def _base64(letters: str) -> str:
    return f"^([{letters}]{{4}})*([{letters}]{{2}}==|[{letters}]{{3}}=)?$"


# xgrammar's own are faster where nothing else is asked of the text
OWN = frozenset(["uuid", "ipv6", "uri"])
_PATTERNS = {
    "date": f"^{_DAY}{_LEAP_DAY}$",
    "time": f"^{_TIME}$",
    "date-time": f"^{_DAY}{_LEAP_DAY}T{_TIME}$",
    "duration": f"^P({_DURATION_DAYS}({_DURATION_TIME})?|{_DURATION_TIME}|{_N}W)$",
    "ipv4": rf"^{_BYTE}(\.{_BYTE}){{3}}$",
    "ipv6": f"^({'|'.join(_IPV6)}|({_GROUP}:){{1,7}}:|:((:{_GROUP}){{1,7}}|:))$",
    "email": rf"^[A-Za-z0-9_+-]+(\.[A-Za-z0-9_+-]+)*@({_LABEL}\.)+[A-Za-z]{{2,24}}$",
    "hostname": rf"^{_LABEL}(\.{_LABEL})*$",
    "uuid": f"^{_HEX}{{8}}(-{_HEX}{{4}}){{3}}-{_HEX}{{12}}$",
    # bounded, for limits of the length
    "uri": rf"^https?://{_LABEL}(\.{_LABEL}){{0,2}}(:\d{{1,4}})?(/{_URI_CHARACTER}{{0,64}}){{0,2}}(\?{_URI_CHARACTER}{{0,64}})?$",
    "json-pointer": f"^{_POINTER}$",
    "relative-json-pointer": rf"^(0|[1-9]\d{{0,3}})(#|{_POINTER})$",
    # OpenAPI's and pydantic's
    **{f"uuid{n}": f"^{_HEX}{{8}}-{_HEX}{{4}}-{n}{_HEX}{{3}}-[89abAB]{_HEX}{{3}}-{_HEX}{{12}}$" for n in range(1, 9)},
    "ipv4network": f"^({_NETWORK})$",
    "base64": _base64("A-Za-z0-9+/"),
    "base64url": _base64("A-Za-z0-9_-"),
}
_SAME = {
    **dict.fromkeys(["uri-reference", "iri", "iri-reference", "uri-template"], "uri"),
    **dict.fromkeys(["ipv4interface", "ipvanyinterface", "ipvanyaddress"], "ipv4"),
    "ipv6interface": "ipv6",
    "ipvanynetwork": "ipv4network",
    "idn-email": "email",
    "idn-hostname": "hostname",
    "byte": "base64",
}
_REFUSED = {
    "regex": "leave it out, or give a pattern for the expressions that may come",
    "json-string": "put the schema of the JSON in it in its place",
    "ipv6network": "give a pattern for the networks that may come",
}
# of integers; what is between 2^53 and 2^63 is left out, since not every reader of JSON holds it exactly
INTEGERS = {
    **{f"int{bits}": (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) for bits in (8, 16, 32)},
    **{f"uint{bits}": (0, 2**bits - 1) for bits in (8, 16, 32)},
    "int64": (-(2**53), 2**53),
    "uint64": (0, 2**53),
}


def known(name: object, place: str) -> str | None:
    """The name under which a format of strings is in `pattern_of`; None when it is an annotation.

    Raises ValueError for what cannot be held.
    """
    if not isinstance(name, str):
        raise ValueError(f"format must be a text (at {place})")
    if name in _REFUSED:
        raise ValueError(f"the format {name!r} is not supported; {_REFUSED[name]} (at {place})")
    name = _SAME.get(name, name)
    return name if name in _PATTERNS else None


def pattern_of(name: str) -> str:
    return _PATTERNS[name]
