"""One run, as the server sees it: built, validated, recorded, evaluated and exported."""
