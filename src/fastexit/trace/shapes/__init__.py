"""The shapes that KVM's events come in, each as the parts of a canonical line.

learned.py finds out what a file has, mender.py makes its lines canonical one by one, bulk.py a chunk at a time. line.py
has the canonical line and its parts; heads.py takes apart what stands before an event, perftrace.py the lines of perf
trace; body.py reads an event's text, fields.py makes it of fields, bytefields.py mends what is cut in these; mail.py
undoes what mail and web pages do to lines, tables.py reads tables of counts.
"""
