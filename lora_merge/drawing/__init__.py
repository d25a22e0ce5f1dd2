"""Charts: values → SVG that needs no script, follows the page's theme and can be read without seeing it."""
