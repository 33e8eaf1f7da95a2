-- lease: takes, renews or gives up a node's lease. Allowed when Redis is full.
--
-- KEYS  barid:node:<id>
-- ARGV  'take' | 'renew' | 'release', ttl ms, incarnation, role, address, load, state, zone, admin,
--       devices.
-- Reply 1: done. 0: it is gone, or another incarnation has it (renew and release only).

local key, verb, incarnation = KEYS[1], ARGV[1], ARGV[3]
if verb ~= 'take' and call('HGET', key, 'incarnation') ~= incarnation then return 0 end
if verb == 'release' then return call('DEL', key) end
call('HSET', key, 'incarnation', incarnation, 'role', ARGV[4], 'address', ARGV[5],
  'load', ARGV[6], 'state', ARGV[7], 'zone', ARGV[8], 'admin', ARGV[9],
  'devices', ARGV[10], 'layout', int(VERSION))
call('PEXPIRE', key, ARGV[2])
return 1
