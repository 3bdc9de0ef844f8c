from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Optional as _Optional

DESCRIPTOR: _descriptor.FileDescriptor

class AddRequest(_message.Message):
    __slots__ = ("file", "source", "label")
    FILE_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    LABEL_FIELD_NUMBER: _ClassVar[int]
    file: bytes
    source: str
    label: str
    def __init__(self, file: _Optional[bytes] = ..., source: _Optional[str] = ..., label: _Optional[str] = ...) -> None: ...

class AddReply(_message.Message):
    __slots__ = ("outcome", "digest", "label", "origin")
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    LABEL_FIELD_NUMBER: _ClassVar[int]
    ORIGIN_FIELD_NUMBER: _ClassVar[int]
    outcome: str
    digest: str
    label: str
    origin: str
    def __init__(self, outcome: _Optional[str] = ..., digest: _Optional[str] = ..., label: _Optional[str] = ..., origin: _Optional[str] = ...) -> None: ...

class LabelRequest(_message.Message):
    __slots__ = ("digest", "label")
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    LABEL_FIELD_NUMBER: _ClassVar[int]
    digest: str
    label: str
    def __init__(self, digest: _Optional[str] = ..., label: _Optional[str] = ...) -> None: ...

class LabelReply(_message.Message):
    __slots__ = ("digest", "label")
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    LABEL_FIELD_NUMBER: _ClassVar[int]
    digest: str
    label: str
    def __init__(self, digest: _Optional[str] = ..., label: _Optional[str] = ...) -> None: ...

class ForgetRequest(_message.Message):
    __slots__ = ("source", "label", "digest", "older_days")
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    LABEL_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    OLDER_DAYS_FIELD_NUMBER: _ClassVar[int]
    source: str
    label: str
    digest: str
    older_days: float
    def __init__(self, source: _Optional[str] = ..., label: _Optional[str] = ..., digest: _Optional[str] = ..., older_days: _Optional[float] = ...) -> None: ...

class ForgetReply(_message.Message):
    __slots__ = ("removed",)
    REMOVED_FIELD_NUMBER: _ClassVar[int]
    removed: int
    def __init__(self, removed: _Optional[int] = ...) -> None: ...

class StatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class StatusReply(_message.Message):
    __slots__ = ("json",)
    JSON_FIELD_NUMBER: _ClassVar[int]
    json: str
    def __init__(self, json: _Optional[str] = ...) -> None: ...
