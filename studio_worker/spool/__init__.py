"""What must survive a crash: the job in hand, finished pictures until they are delivered, jobs that failed.

Owns the notes in the state folder. Delivers nothing itself.
"""
