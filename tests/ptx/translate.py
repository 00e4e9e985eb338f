"""PTX to C++: a function for each kernel, which a thread runs from beginning to end (runtime.h)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

from .operations import OPERATIONS, SIZES

SPECIAL = {"%tid.x": "index", "%ctaid.x": "block", "%ntid.x": "threads", "%nctaid.x": "blocks"}
# By size: registers, and what one holds before it is written, which nothing may count on.
REGISTERS = {0: "pred", 2: "b16", 4: "b32", 8: "b64"}
RUBBISH = {0: "true", 2: "0xdead", 4: "0xdeadbeef", 8: "0xdeadbeefdeadbeef"}
IGNORED = (".pragma ", ".loc ", ".file ")
KERNEL = re.compile(r"\.entry\s+([\w$]+)\s*\((.*?)\)([^{;]*)\{", re.DOTALL)
PARAMETER = re.compile(
    r"\.param(?: \.align (?P<align>\d+))? \.(?P<type>\w+)(?: \.ptr[ .\w]*)? (?P<name>[\w$]+)"
    r"(?:\[(?P<count>\d+)\])?"
)


class Untranslatable(Exception):
    """PTX that nothing here says the meaning of."""


class Parameter(NamedTuple):
    name: str
    offset: int
    size: int


class Translation(NamedTuple):
    """C++, and each kernel's parameters."""

    code: str
    kernels: dict[str, list[Parameter]]


def translate(ptx: str, wanted: str = "") -> Translation:
    """The kernels of a module whose names the pattern ``wanted`` is found in."""
    text = re.sub(r"/\*.*?\*/", "", ptx, flags=re.DOTALL)
    text = re.sub(r"//.*", "", text).split("\t.section", 1)[0]  # the rest is of debuggers
    kernels = [Kernel(*parts) for parts in split_kernels(text) if re.search(wanted, parts[0])]
    if not kernels:
        raise Untranslatable("there is no kernel")
    code = '#include "runtime.h"\n\nnamespace ptx {\nnamespace {\n\n'
    code += "\n".join(kernel.definition() for kernel in kernels)
    code += "\n}  // namespace\n}  // namespace ptx\n\n"
    code += 'extern "C" void ptx_register_kernels(void (*add)(const ptx::Kernel&)) {\n'
    code += "".join(f"  add({kernel.registration()});\n" for kernel in kernels) + "}\n"
    return Translation(code, {kernel.name: kernel.parameters for kernel in kernels})


def split_kernels(text: str) -> Iterator[tuple[str, str, str, str]]:
    """Name, parameters, directives and body of each."""
    for match in KERNEL.finditer(text):
        depth, end = 1, match.end()
        while depth:
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            end += 1
        yield match[1], match[2], match[3], text[match.end() : end - 1]


def layout(parameters: str) -> list[Parameter]:
    """Where they lie: each at its alignment, one after the other."""
    placed: list[Parameter] = []
    end = 0
    for text in filter(None, (" ".join(part.split()) for part in parameters.split(","))):
        match = PARAMETER.fullmatch(text)
        if match is None:
            raise Untranslatable(text)
        item = SIZES[match["type"]]
        end += -end % int(match["align"] or item)
        placed.append(Parameter(match["name"], end, item * int(match["count"] or 1)))
        end += placed[-1].size
    return placed


def statements(body: str) -> Iterator[str]:
    """Instructions and directives without their semicolons, and labels with their colons."""
    body = re.sub(r"^\s*\.(loc|file)\b.*", "", body, flags=re.MULTILINE)
    for part in body.split(";"):
        statement = " ".join(part.split())
        while label := re.match(r"([\w$]+) ?: ?", statement):
            yield label[1] + ":"
            statement = statement[label.end() :]
        # A brace that opens or closes a scope: names are not used twice.
        statement = re.sub(r"^[{} ]+", "", statement)
        if statement and not statement.startswith(IGNORED):
            yield statement


def split_operands(text: str) -> list[str]:
    """At commas, but not those of a vector's elements."""
    return [part.strip() for part in re.findall(r"(?:\{[^}]*\}|\[[^\]]*\]|[^,{\[])+", text)]


def elements(operand: str) -> list[str]:
    """Those of a vector, or the operand."""
    return [part.strip() for part in operand.strip("{}").split(",")]


def identifier(name: str) -> str:
    """Of a register or a label, and of no type."""
    return name.replace("%", "its_").replace("$", "at_")


class Kernel:
    """One kernel's translation, a statement after the other."""

    def __init__(self, name: str, parameters: str, directives: str, body: str) -> None:
        self.name = name
        self.parameters = layout(parameters)
        self._threads = re.search(r"\.(?:maxntid|reqntid)\s+(\d+)", directives)
        self._registers: dict[str, str] = {}  # and their types
        self._places = {parameter.name: parameter.offset for parameter in self.parameters}
        self._shared_size = 0
        self._sites = 0  # of accesses and barriers
        self._waits = False
        self._lines = [self._line(statement) for statement in statements(body)]

    def definition(self) -> str:
        registers = "".join(
            f"  {REGISTERS[SIZES[t]]} {identifier(name)} = {RUBBISH[SIZES[t]]};\n"
            for name, t in self._registers.items()
        )
        body = "".join(f"  {line}\n" for line in self._lines if line)
        return f"void {self.name}(Thread& thread) {{\n{registers}{body}}}\n"

    def registration(self) -> str:
        """What runtime.h's Kernel holds."""
        sizes = ", ".join(f"{{{p.offset}, {p.size}}}" for p in self.parameters)
        threads = self._threads[1] if self._threads else "1024"
        waits = str(self._waits).lower()
        fields = f'"{self.name}", &ptx::{self.name}, {{{sizes}}}, {self._shared_size}, {threads}'
        return f"{{{fields}, {waits}}}"

    # --- statements ---

    def _line(self, statement: str) -> str:
        if statement.endswith(":"):
            return identifier(statement) + ";"
        if statement.startswith("."):
            return self._directive(statement)
        predicate = re.match(r"@(!?)(%\w+) ", statement)
        if predicate is None:
            return self._instruction(statement)
        rest = self._instruction(statement[predicate.end() :])
        return f"if ({predicate[1]}{identifier(predicate[2])}) {{ {rest} }}"

    def _directive(self, statement: str) -> str:
        if registers := re.fullmatch(r"\.reg \.(\w+) (.+)", statement):
            for name in elements(registers[2]):
                several = re.fullmatch(r"(%\w+)<(\d+)>", name)
                names = [f"{several[1]}{i}" for i in range(int(several[2]))] if several else [name]
                # Blocks may have registers of the same name, each written before it is read.
                if {self._registers.get(name, registers[1]) for name in names} != {registers[1]}:
                    raise Untranslatable(f"{statement}, of another type before")
                self._registers.update(dict.fromkeys(names, registers[1]))
        elif shared := re.fullmatch(r"\.shared \.align (\d+) \.b8 ([\w$]+)\[(\d+)\]", statement):
            begin = self._shared_size + -self._shared_size % int(shared[1])
            self._places[shared[2]] = begin
            self._shared_size = begin + int(shared[3])
        else:
            raise Untranslatable(statement)
        return ""

    def _instruction(self, statement: str) -> str:
        opcode, _, rest = statement.partition(" ")
        operands = split_operands(rest)
        if opcode in ("bra", "bra.uni"):
            return f"goto {identifier(operands[0])};"
        if opcode == "ret":
            return "return;"
        if opcode == "bar.sync" and operands == ["0"]:
            self._waits = True
            return f"thread.barrier({self._site()});"
        if opcode in ("shfl.sync.bfly.b32", "shfl.sync.idx.b32"):
            return self._shuffle(opcode, operands)
        if opcode == "redux.sync.max.u32":
            to, given, mask = operands[0], *(self._value(source, "u32") for source in operands[1:])
            self._waits = True
            call = f"thread.largest({self._site()}, {given}, ~{mask} == 0)"
            return self._assign(to, "u32", call)
        if opcode.startswith(("ld.", "st.")):
            return self._access(opcode, operands)
        if opcode.startswith("mov.b") and "{" in rest:
            return self._move_pieces(opcode, operands)
        if opcode in ("setp.eq.f16x2", "setp.neu.f16x2"):
            return self._compare_halves(opcode, operands)
        operation = OPERATIONS.get(opcode)
        if operation is None or len(operands) != 1 + len(operation.operands):
            raise Untranslatable(statement)
        to, *sources = operands
        pairs = zip(sources, operation.operands, strict=True)
        code = operation.code.format(*(self._value(source, t) for source, t in pairs))
        return self._assign(to, operation.result, code)

    def _site(self) -> int:
        self._sites += 1
        return self._sites

    def _access(self, opcode: str, operands: list[str]) -> str:
        """``ld`` and ``st`` of one element, or of a vector, at once."""
        match = re.fullmatch(
            r"(ld|st)\.(global|shared|param)(?:\.nc)?(?:\.v([24]))?\.(\w+)", opcode
        )
        if match is None or match[4] not in SIZES:
            raise Untranslatable(f"{opcode} {', '.join(operands)}")
        space, count, t = match[2], int(match[3] or 1), match[4]
        to, of = operands
        registers = elements(to if match[1] == "ld" else of)
        if len(registers) != count:
            raise Untranslatable(f"{opcode} {', '.join(operands)}")
        access = f"<{t}, {count}>(Space::{space}, {self._address(of if match[1] == 'ld' else to)}"
        if match[1] == "st":
            values = ", ".join(self._value(name, t) for name in registers)
            return f"thread.store{access}, {self._site()}, {{{values}}});"
        read = f"const auto read = thread.load{access}, {self._site()});"
        return " ".join(
            ["{", read, *(self._assign(r, t, f"read[{i}]") for i, r in enumerate(registers)), "}"]
        )

    def _shuffle(self, opcode: str, operands: list[str]) -> str:
        """Of whole warps, all of which take part."""
        to, *sources = operands
        given, lane, clamp, mask = (self._value(source, "b32") for source in sources)
        self._waits = True
        if "bfly" in opcode:
            lane = f"thread.lane() ^ {lane}"
        call = f"thread.shuffle({self._site()}, {given}, {lane}, {clamp} == 31 && ~{mask} == 0)"
        return self._assign(to.partition("|")[0], "b32", call)

    def _compare_halves(self, opcode: str, operands: list[str]) -> str:
        """``setp`` of the lower halves, and of the upper."""
        to, *sources = operands
        code = OPERATIONS[opcode.removesuffix("x2")].code
        assigned = []
        for name, shift in zip(to.split("|"), (0, 16), strict=True):
            halves = (f"b16({self._value(source, 'b32')} >> {shift})" for source in sources)
            assigned.append(self._assign(name, "pred", code.format(*halves)))
        return " ".join(assigned)

    def _move_pieces(self, opcode: str, operands: list[str]) -> str:
        """``mov`` between a register and several that make it up, the lowest bits first."""
        whole, (to, of) = opcode.partition(".")[2], operands
        pieces = elements(to if "{" in to else of)
        piece = f"b{8 * SIZES[whole] // len(pieces)}"
        shifts = [8 * SIZES[piece] * i for i in range(len(pieces))]
        if "{" in of:
            parts = zip(pieces, shifts, strict=True)
            terms = [f"{whole}({self._value(name, piece)}) << {n}" for name, n in parts]
            return self._assign(to, whole, " | ".join(terms))
        source = self._value(of, whole)
        moved = [
            self._assign(name, piece, f"{piece}(moved >> {n})")
            for name, n in zip(pieces, shifts, strict=True)
            if name != "_"
        ]
        return " ".join(["{", f"const {whole} moved = {source};", *moved, "}"])

    # --- operands ---

    def _check_fit(self, name: str, t: str) -> None:
        """An integer may be part of a register, or extended to it; nothing else may."""
        if name not in self._registers:
            raise Untranslatable(f"{name} is no register")
        size = SIZES[self._registers[name]]
        if size != SIZES[t] and (t in ("f32", "f64", "pred") or size < SIZES[t]):
            raise Untranslatable(f"{name} is no register for {t}")

    def _assign(self, name: str, t: str, code: str) -> str:
        self._check_fit(name, t)
        return f"put<{t}>({identifier(name)}, {code});"

    def _value(self, operand: str, t: str) -> str:
        """An operand, as a value of type ``t``."""
        if operand in self._registers:
            self._check_fit(operand, t)
            return f"get<{t}>({identifier(operand)})"
        if operand in SPECIAL:
            return f"{t}(thread.{SPECIAL[operand]})"
        if operand in self._places:
            return f"{t}({self._places[operand]})"
        if number := re.fullmatch(r"0[fF]([0-9A-Fa-f]{8})|0[dD]([0-9A-Fa-f]{16})", operand):
            return f"get<{t}>(b{4 * len(number[1] or number[2])}(0x{number[1] or number[2]}))"
        if re.fullmatch(r"-?(0x[0-9A-Fa-f]+|\d+)U?", operand) and t not in ("f32", "f64"):
            value = int(operand.rstrip("U"), 0)
            if t == "pred":
                return str(bool(value)).lower()
            return f"{t}({value % (1 << 64)}u)"
        raise Untranslatable(f"{operand} is no {t}")

    def _address(self, operand: str) -> str:
        match = re.fullmatch(r"\[ ?([%\w$]+) ?(?:\+ ?(-?\w+) ?)?\]", operand)
        if match is None:
            raise Untranslatable(operand)
        register = self._registers.get(match[1], "b64")
        base = self._value(match[1], f"u{8 * SIZES[register]}")
        return f"u64({base}) + u64({int(match[2] or '0', 0)})"
