"""The one wire of plug-ins that move data between servers."""
