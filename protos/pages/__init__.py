"""The look of a page, for whoever writes one: `charts` and `rows` draw SVG, `tables` formats numbers and tables, `style` puts
the document around them. Text and numbers in, markup out; nothing here knows what a run or an audit is. A page refers to
nothing outside itself and runs no script.
"""
