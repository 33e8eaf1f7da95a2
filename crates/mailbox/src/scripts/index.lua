-- index: notes that a node has a lease, and drops nodes that have long had none. Allowed when Redis
-- is full. A key of its own slot: leases are in other ones.
--
-- KEYS  barid:nodes
-- ARGV  id, ttl ms, how long a node is kept after its lease ended, ms.
-- Reply 1.

call('ZADD', KEYS[1], int(NOW + tonumber(ARGV[2])), ARGV[1])
call('ZREMRANGEBYSCORE', KEYS[1], '-inf', int(NOW - tonumber(ARGV[3])))
return 1
