"""Compiles chat templates to code that counts its operations, and refuses what is not among the names allowed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from types import BuiltinMethodType, FunctionType, MethodType
from typing import Any

from jinja2 import Template, TemplateAssertionError, Undefined, nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.exceptions import SecurityError
from jinja2.runtime import Context, LoopContext, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Joiner, Namespace

from llmpipe.runners.templates.filters import CHARGED, FILTERS, TESTS
from llmpipe.runners.templates.limits import NODE, Rendering
from llmpipe.runners.templates.methods import ATTRIBUTES, FUNCTIONS, METHODS

STATEMENTS: tuple[type[nodes.Node], ...] = (
    *(nodes.Template, nodes.Output, nodes.TemplateData, nodes.Assign, nodes.AssignBlock, nodes.NSRef, nodes.With),
    *(nodes.If, nodes.For, nodes.Break, nodes.Continue, nodes.Macro, nodes.CallBlock, nodes.FilterBlock, nodes.Scope),
    *(nodes.Expr, nodes.Pair, nodes.Keyword, nodes.Operand),
)
"""The parts of the language; what loads other templates is not among them."""
_TAGS: dict[type[nodes.Node], str] = {nodes.FromImport: "from", nodes.ScopedEvalContextModifier: "autoescape"}
MOST_SOURCE = 2**16
"""Characters of a template; published ones have up to 20,000. What compiling takes grows faster than they do."""
_OPERATIONS = ("spend", "text", "concatenated", "sliced", "compared", "key")
_BINARY = {"Add": "plus", "Sub": "minus", "Mul": "times", "Pow": "power", "Mod": "modulo"}
"""Methods of a rendering that the code of a template calls by these names."""
_OWN_FUNCTIONS = frozenset(FUNCTIONS.values())
_METHODS_OF_DICT = frozenset(dir(dict))


class CountingCode(CodeGenerator):
    """Writes code that calls the operations of the rendering; nothing is computed while it is written."""

    environment: BoundedEnvironment

    def write_commons(self) -> None:
        """Write the names that all code of a function needs."""
        super().write_commons()
        self.writeline("concat = context.joined")
        for name in (*_OPERATIONS, *_BINARY.values()):
            self.writeline(f"{name} = context.{name}")

    def blockvisit(self, nodes: Iterable[nodes.Node], frame: Frame) -> None:
        """Write the code of statements that follow each other; each time that they are done counts their parts."""
        nodes = list(nodes)
        self.writeline(f"spend({NODE * (1 + sum(map(_count_parts, nodes)))})")
        super().blockvisit(nodes, frame)

    def _filter_test_common(self, node: nodes.Filter | nodes.Test, frame: Frame, is_filter: bool) -> Any:
        if node.name not in (FILTERS if is_filter else TESTS) and not frame.soft_frame:  # else: once it is reached
            self.fail(refusal("filter" if is_filter else "test", node.name), node.lineno)
        return super()._filter_test_common(node, frame, is_filter)

    def _output_child_to_const(self, node: nodes.Expr, frame: Frame, finalize: Any) -> str:
        if not isinstance(node, (nodes.TemplateData, nodes.Const)):
            raise nodes.Impossible()
        return super()._output_child_to_const(node, frame, finalize)

    def _output_child_pre(self, node: nodes.Expr, frame: Frame, finalize: Any) -> None:
        self.write("text(")

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        """Write `~`."""
        self._call("concatenated", [nodes.Tuple(node.nodes, "load")], frame)

    def visit_Compare(self, node: nodes.Compare, frame: Frame) -> None:
        """Write comparisons; those with something small as they are."""
        operands = [node.expr, *(part.expr for part in node.ops)]
        if all(map(_is_quick, operands, [part.op for part in node.ops], operands[1:])):
            return super().visit_Compare(node, frame)
        left: nodes.Expr | str = node.expr
        for number, part in enumerate(node.ops):
            self.write("(" if not number else " and ")
            self.write(f"compared({_SIGNS[part.op]!r}, ")
            self.write(left) if isinstance(left, str) else self.visit(left, frame)
            left = self.temporary_identifier()
            self.write(f", ({left} := ")
            self.visit(part.expr, frame)
            self.write("))")
        self.write(")")

    def visit_Getitem(self, node: nodes.Getitem, frame: Frame) -> None:
        """Write a look-up, or a slice."""
        if not isinstance(node.arg, nodes.Slice):
            return super().visit_Getitem(node, frame)
        places = (node.arg.start, node.arg.stop, node.arg.step)
        self._call("sliced", [node.node, *(place or nodes.Const(None) for place in places)], frame)

    def visit_Pair(self, node: nodes.Pair, frame: Frame) -> None:
        """Write a key and a value."""
        self._call("key", [node.key], frame)
        self.write(": ")
        self.visit(node.value, frame)

    def visit_Dict(self, node: nodes.Dict, frame: Frame) -> None:
        """Write a dict."""
        self.write("{")
        for pair in node.items:
            self.visit_Pair(pair, frame)
            self.write(", ")
        self.write("}")

    def _call(self, operation: str, values: Iterable[nodes.Expr], frame: Frame) -> None:
        self.write(f"{operation}(")
        for value in values:
            self.visit(value, frame)
            self.write(", ")
        self.write(")")


def _binary(operation: str) -> Callable[[CountingCode, nodes.BinExpr, Frame], None]:
    def visitor(self: CountingCode, node: nodes.BinExpr, frame: Frame) -> None:
        self._call(operation, (node.left, node.right), frame)

    return visitor


for _node, _operation in _BINARY.items():
    setattr(CountingCode, f"visit_{_node}", _binary(_operation))

_SIGNS = {"eq": "==", "ne": "!=", "lt": "<", "lteq": "<=", "gt": ">", "gteq": ">=", "in": "in", "notin": "not in"}


def _is_quick(left: nodes.Expr, sign: str, right: nodes.Expr) -> bool:
    """Tell whether a comparison is quick whatever the values: with a constant, or with a truth value."""
    if sign in ("in", "notin"):
        return isinstance(right, (nodes.List, nodes.Tuple)) and all(isinstance(i, nodes.Const) for i in right.items)
    return isinstance(left, (nodes.Const, nodes.Compare, nodes.Not, nodes.Test)) or isinstance(
        right, (nodes.Const, nodes.Compare, nodes.Not, nodes.Test)
    )


def _count_parts(node: nodes.Node) -> int:
    """Return how many names, operators and calls a statement has, without those of the statements inside it."""
    count, waiting = 0, [node]
    while waiting:
        count += 1
        waiting.extend(waiting.pop().iter_child_nodes(exclude=("body", "else_")))
    return count


def refusal(kind: str, name: str) -> str:
    """Return why a template may not use `name`."""
    allowed = sorted(FILTERS if kind == "filter" else TESTS)
    names = ", ".join(name for name in allowed if name.isidentifier())
    return f"the {kind} {name!r} is not one that chat templates may use, which are {names}"


class _Named(dict[str, Callable[..., Any]]):
    """Filters or tests by name; any other name is a function that refuses to be called."""

    def __init__(self, kind: str, functions: Mapping[str, Callable[..., Any]]) -> None:
        super().__init__(functions)
        self._kind = kind

    def __missing__(self, name: str) -> Callable[..., Any]:
        def refused(*args: Any, **options: Any) -> Any:
            raise SecurityError(refusal(self._kind, name))

        return refused

    def get(self, name: Any, default: Any = None) -> Any:
        """Return the function called `name`."""
        if not isinstance(name, (str, Undefined)):
            raise SecurityError(f"it uses a {type(name).__name__} as a {self._kind}")
        return default if isinstance(name, Undefined) else self[name]


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """A sandbox in which a template can use what chat templates need, and can neither run for ever nor fill memory."""

    code_generator_class = CountingCode
    context_class = Rendering

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, optimized=False)
        self.filters: dict[str, Any] = _Named("filter", FILTERS)
        self.tests: dict[str, Any] = _Named("test", TESTS)
        self.globals = dict(FUNCTIONS)

    def render(self, template: Template, variables: Mapping[str, Any]) -> str:
        """Return the text that `template` makes with `variables`.

        Raises:
            SecurityError: it uses or takes more than a template may.
        """
        rendering = template.new_context(dict(variables))
        assert isinstance(rendering, Rendering)
        return rendering.joined(template.root_render_func(rendering))

    # --- while a template is compiled ---------------------------------------------------------------------------------

    def _generate(self, source: nodes.Template, *args: Any, **options: Any) -> str:
        for node in list(source.find_all(nodes.Node)):
            if not isinstance(node, STATEMENTS):
                tag = _TAGS.get(type(node), type(node).__name__.lower())
                raise TemplateAssertionError(f"chat templates may not use {tag!r}", node.lineno)
            if isinstance(node, (nodes.Filter, nodes.Test)) and (node.dyn_args or node.dyn_kwargs):
                raise TemplateAssertionError("chat templates may not use '*' for arguments of filters", node.lineno)
            if isinstance(node, nodes.For) and node.test is not None:
                node.test = _charged(node.test)
            elif isinstance(node, (nodes.Macro, nodes.CallBlock)):
                node.defaults = list(map(_charged, node.defaults))
        return super()._generate(source, *args, **options)

    # --- while it renders ---------------------------------------------------------------------------------------------

    def getattr(self, obj: Any, attribute: str) -> Any:
        """Return `obj.attribute`."""
        if type(obj) is dict and attribute not in _METHODS_OF_DICT:
            try:
                return obj[attribute]
            except KeyError:
                return self.undefined(obj=obj, name=attribute)
        return super().getattr(obj, attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        """Return `obj[argument]`."""
        return super().getitem(obj, Rendering.key(argument))

    def unsafe_undefined(self, obj: Any, attribute: str) -> Undefined:
        """Return what stands for an attribute that may not be used: an error, once it is."""
        reason = f"chat templates may not use {attribute[:80]!r} of a {type(obj).__name__}"
        return self.undefined(reason, obj=obj, name=attribute, exc=SecurityError)

    def wrap_str_format(self, value: Any) -> None:
        """Leave `str.format` to `call`."""

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Tell whether the attribute is one that templates may use."""
        if type(obj) is Namespace:
            return not attr.startswith("_")
        return any(attr in ATTRIBUTES.get(kind, ()) for kind in type(obj).__mro__)

    def call(self, context: Context, function: Any, *args: Any, **options: Any) -> Any:
        """Call `function`, if it is one that templates may call."""
        assert isinstance(context, Rendering)
        options.pop("_loop_vars", None)
        options.pop("_block_vars", None)
        context.spend(NODE * (5 + len(args) + len(options)))
        if options:
            list(map(context.key, options))
        kind = type(function)
        if kind is BuiltinMethodType or kind is MethodType:
            for owner in type(function.__self__).__mro__:
                if method := METHODS.get(owner, {}).get(function.__name__):
                    return method(context, function.__self__, *args, **options)
        elif kind is Macro or kind is LoopContext:
            return context.nested(function, args, options)
        elif kind is Joiner or isinstance(function, Undefined):
            return function(*args, **options)
        elif kind is FunctionType and function in _OWN_FUNCTIONS:
            return function(context, *args, **options)
        if any(function is given for given in context.parent.values()):
            return context.call_given(function, args, options)
        raise SecurityError(f"it calls {getattr(function, '__name__', kind.__name__)!r}, which it may not")


def _charged(expression: nodes.Node) -> nodes.Expr:
    """Return an expression that counts its parts each time."""
    work = nodes.Const(NODE * (1 + _count_parts(expression)))
    return nodes.Filter(expression, CHARGED, [work], [], None, None, lineno=expression.lineno)
