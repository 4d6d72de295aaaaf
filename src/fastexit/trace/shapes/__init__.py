"""The shapes that KVM's events come in, each as the parts of a canonical line.

line.py has the parts and the canonical line, heads.py takes apart what stands before an event, whichever tool wrote it,
perftrace.py the lines of perf trace, fields.py turns events printed as fields into KVM's text, mail.py undoes what mail
does to lines, tables.py reads tables of counts, beside.py tells what else stands between lines.
"""
