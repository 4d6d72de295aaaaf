"""A machine's settings: what is made of their one declaration says all of it."""

from __future__ import annotations

import inspect
import typing

import pytest

import fastexit as fx
from fastexit import config
from fastexit import layout as L
from fastexit.settings import SETTINGS, Settings

NO_SETTINGS = {"FASTPATH", "TRACE", "LINT0_REENABLED", "MMIO_HOLE", "HYPERV_ENFORCE", "COSTS"}
"""Bits of H_CONFIG that a running machine changes, that disable_quirks takes away, or that are a setting's second."""
NO_SWITCHES = {"kernel", "hyperv_features"}


def test_every_bit_is_one_setting() -> None:
    """Every switch among layout.CONFIG_* belongs to exactly one setting."""
    bits = {getattr(L, name) for name in dir(L) if name.startswith("CONFIG_")}
    others = {getattr(L, f"CONFIG_{name}") for name in NO_SETTINGS}
    assert sorted(setting.bit for setting in SETTINGS.values() if setting.bit) == sorted(bits - others)


def test_values_are_of_the_type() -> None:
    """Defaults and what flags stand for are values of the keyword's type; a switch has its bit, a number has limits."""
    for name, kind in typing.get_type_hints(Settings).items():
        setting = SETTINGS[name]
        for value in (setting.default, *setting.flags.values()):
            assert type(value) in (typing.get_args(kind) or (kind,)), name
        assert bool(setting.bit) is (kind is not int and name not in NO_SWITCHES), name
        assert bool(setting.limits) is (kind is int and name != "x2apic_api"), name
        assert bool(setting.choices) is (kind is str and name != "kernel"), name


@pytest.mark.parametrize("name", [name for name, setting in SETTINGS.items() if setting.bit])
def test_switch_is_its_bit(name: str) -> None:
    """A switch that is thrown changes its own bit; ``vendor`` and ``apicv`` take along what goes by them."""
    setting = SETTINGS[name]
    svm = {"vendor": "svm"} if name in ("x2avic", "ipiv") else {}
    before = config.header(typing.cast(Settings, svm))[L.H_CONFIG]
    thrown = setting.choices[1] if setting.choices else not before & setting.bit
    after = config.header(typing.cast(Settings, {**svm, name: thrown}))[L.H_CONFIG]
    along = {"vendor": L.CONFIG_HV_TIMER | L.CONFIG_IPIV}.get(name, 0)
    assert before ^ after == setting.bit | along


def test_help_shows_every_setting() -> None:
    """At run time the signature has each keyword with its type and default, and the docstring says what it means."""
    parameters, text = inspect.signature(fx.Machine).parameters, inspect.getdoc(fx.Machine)
    assert list(parameters) == ["vcpus", "apic_ids", "costs", "dispatcher", "clock", *SETTINGS]
    assert text
    assert "{settings}" not in text
    for name, setting in SETTINGS.items():
        assert parameters[name].default == setting.default
        assert parameters[name].annotation == typing.get_type_hints(Settings)[name]
        assert text.count(f"\n    {name}: ") == 1
        assert setting.doc in " ".join(text.split()), name


@pytest.mark.parametrize(
    ("keyword", "line"),
    [
        ("kernal", "kernal is no setting of a Machine: kernel?"),
        ("vcpu", "vcpu is no setting of a Machine: vcpus?"),
        ("cost", "cost is no setting of a Machine: costs?"),
        ("settings", "settings is no setting of a Machine"),
        ("colour", "colour is no setting of a Machine"),
    ],
)
def test_misspelt_keyword(keyword: str, line: str) -> None:
    """A keyword that is none is refused with the one that was meant."""
    with pytest.raises(TypeError) as caught:
        fx.Machine(**{keyword: "6.18"})
    assert str(caught.value) == line
