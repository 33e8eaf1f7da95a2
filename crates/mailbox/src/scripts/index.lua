-- index: notes that a node has a lease or gave it up, and drops nodes that have long had none.
-- Allowed when Redis is full. A key of its own slot: leases are in other ones.
--
-- KEYS  barid:nodes
-- ARGV  id, ttl ms (0: given up), how long a node is kept after its lease ended, ms.
-- Reply 1. The score is when the lease ends, 0: given up, so its absence is no accident.

local ttl = tonumber(ARGV[2])
call('ZREMRANGEBYSCORE', KEYS[1], '-inf', int(NOW - tonumber(ARGV[3])))
call('ZADD', KEYS[1], ttl > 0 and int(NOW + ttl) or '0', ARGV[1])
return 1
