"""The paper's tables and figures, in form, on the models that are at hand."""

from .experiment import load_table, reproduce, write_table
from .quality import TABLES, Table

__all__ = ["TABLES", "Table", "load_table", "reproduce", "write_table"]
