"""Objects that may be imported, named in annotations and used as decorators, and that refuse to be called."""

import types


class StandInCalledError(RuntimeError):
    """Something ran a function of a package that is only a stand-in on this machine."""

    def __init__(self, name):
        package = name.partition(".")[0]
        super().__init__(
            f"{name} was called, but {package} is only a stand-in on this CPU-only installation of "
            "SGLang; this "
            f"feature or model needs the real {package}, so it does not run without a GPU."
        )


class StandIn:
    """A function, constant or namespace of a package that is not there. Attributes are stand-ins again."""

    def __init__(self, name):
        self._stand_in_name = name

    def __getattr__(self, attribute):
        if attribute.startswith("__"):
            raise AttributeError(attribute)
        return StandIn(f"{self._stand_in_name}.{attribute}")

    def __call__(self, *args, **kwargs):
        raise StandInCalledError(self._stand_in_name)

    def __getitem__(self, item):  # `kernel[grid]` and `Generic[T]`
        return self

    def __or__(self, other):  # `tl.tensor | None` in annotations
        return self

    __ror__ = __or__

    def __mro_entries__(self, bases):
        return ()

    def __repr__(self):
        return f"<stand-in for {self._stand_in_name}>"


def stand_in_class(module_name, class_name):
    """A class that can be subclassed, raised and caught if it is an exception, built with any arguments."""
    is_exception = class_name.endswith(("Error", "Exception", "OutOfResources"))
    body = {"__module__": module_name}
    if not is_exception:
        body["__init__"] = lambda self, *args, **kwargs: None
    return type(class_name, (Exception,) if is_exception else (), body)


class StandInModule(types.ModuleType):
    """Every attribute exists: a class when its name is capitalised, a `StandIn` otherwise."""

    def __getattr__(self, attribute):
        if attribute.startswith("__"):
            raise AttributeError(f"module {self.__name__!r} (a stand-in) has no attribute {attribute!r}")
        if attribute[:1].isupper():
            value = stand_in_class(self.__name__, attribute)
        else:
            value = StandIn(f"{self.__name__}.{attribute}")
        setattr(self, attribute, value)
        return value
