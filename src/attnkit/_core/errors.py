"""Every exception attnkit raises.

AttnkitError
├── InputError (also ValueError)          the call is wrong; the message names the argument, what came, what is allowed
│   ├── ShapeError                        ranks or sizes disagree
│   ├── DTypeError                        a dtype that is not allowed here
│   ├── OptionError                       an unknown name or a value outside its range
│   └── UnsupportedError                  a combination that is refused by name
├── PolicyError (also ValueError)         inference policies that conflict with each other or with the model
│   └── UnsupportedArchitecture           the model lacks what the policy needs
├── BackendUnavailable (also RuntimeError)   nothing allowed can run; every reason is listed
├── MissingExtra (also ImportError)       an optional package is absent; the message is the install line
├── MissingAsset (also FileNotFoundError)    a model, text or font is absent; the message is the fetch line
├── DeviceUnavailable (also RuntimeError) the device asked for is not here, or its memory does not suffice
└── CheckFailed                           a measurement came out outside its error budget

`exit_code` is what the command line exits with when the exception reaches it.
"""

__all__ = [
    "AttnkitError",
    "BackendUnavailable",
    "CheckFailed",
    "DTypeError",
    "DeviceUnavailable",
    "InputError",
    "MissingAsset",
    "MissingExtra",
    "OptionError",
    "PolicyError",
    "ShapeError",
    "UnsupportedArchitecture",
    "UnsupportedError",
]


class AttnkitError(Exception):
    """Base of all of them: `except attnkit.errors.AttnkitError` catches what attnkit raises on purpose."""

    exit_code = 4


class InputError(AttnkitError, ValueError):
    """An argument is wrong."""


class ShapeError(InputError):
    """A tensor's rank or sizes disagree with what the function documents."""


class DTypeError(InputError):
    """A tensor's dtype is not allowed here."""


class OptionError(InputError):
    """A name that is not registered, or a value outside its range."""


class UnsupportedError(InputError):
    """A combination of arguments that is refused by name."""


class PolicyError(AttnkitError, ValueError):
    """Inference policies that conflict with each other, with the cache or with the model."""


class UnsupportedArchitecture(PolicyError):
    """The model lacks what the policy needs."""


class BackendUnavailable(AttnkitError, RuntimeError):
    """No allowed backend can run the call; the message lists each one's reasons."""


class MissingExtra(AttnkitError, ImportError):
    """An optional package is not installed; the message is the install line."""

    exit_code = 3


class MissingAsset(AttnkitError, FileNotFoundError):
    """A model, corpus or font is not installed; the message is the fetch line."""

    exit_code = 3


class DeviceUnavailable(AttnkitError, RuntimeError):
    """The device asked for is not here, or its memory does not suffice."""

    exit_code = 5


class CheckFailed(AttnkitError):
    """A measurement lies outside its error budget."""

    exit_code = 6
