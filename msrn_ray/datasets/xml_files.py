"""Reads XML files that nobody has checked: without declarations of types or entities, which can exhaust the memory or read other files."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from typing import NoReturn
from xml.parsers import expat

from ..errors import UserError
from ..io.storage import Location
from .text_files import read_data


class _DeclarationError(ValueError):
    """A document type or an entity is declared."""


def read_xml(path: Location, fix: str) -> ET.Element:
    """Return the root of an XML file.

    Args:
        path: the file.
        fix: what to do if it is missing, for the message.

    Raises:
        UserError: if the file is missing, is not XML, or declares a document type or an entity.
    """
    data = read_data(path, fix)
    try:
        _refuse_declarations(data)
        return ET.fromstring(data)
    except _DeclarationError:
        raise UserError(
            f"{path}: not an XML file that is safe to read: it declares a document type or entities (<!DOCTYPE ...>);"
            " remove the declaration"
        ) from None
    except (ET.ParseError, expat.ExpatError, ValueError, LookupError) as error:  # the last two for unknown encodings
        raise UserError(f"{path}: not an XML file ({error}); unpack it again") from None


def _refuse_declarations(data: bytes) -> None:
    """Parse the file once without a tree: a search for text would miss declarations in other encodings."""

    def refuse(*_: object) -> NoReturn:
        raise _DeclarationError

    parser = expat.ParserCreate()
    parser.StartDoctypeDeclHandler = refuse
    parser.EntityDeclHandler = refuse
    parser.Parse(data, True)
