"""Report of a study: one page, its charts, tables and claims."""
