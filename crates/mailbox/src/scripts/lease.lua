-- lease: writes or removes a node's lease. Allowed when Redis is full.
--
-- KEYS  barid:node:<id>
-- ARGV  'hold' | 'release', ttl ms, incarnation, number, then names and values of the other fields.
-- Reply {1 done, 0 refused; incarnation and number of the lease before, 0 and 0 if there was none}.
--
-- An earlier write never undoes a later one: a higher incarnation refuses, and so does a higher number of the
-- same incarnation. A lower incarnation is an earlier one, which a failover may bring back.

local key, verb, ttl = KEYS[1], ARGV[1], ARGV[2]
local incarnation, number = tonumber(ARGV[3]), tonumber(ARGV[4])
local before = call('HMGET', key, 'incarnation', 'number')
local incarnation_before, number_before = tonumber(before[1] or 0), tonumber(before[2] or 0)
local reply = { 1, int(incarnation_before), int(number_before) }
if incarnation_before > incarnation
  or (incarnation_before == incarnation and number_before > number) then
  reply[1] = 0
  return reply
end
if incarnation_before ~= incarnation or verb == 'release' then call('DEL', key) end
if verb == 'release' then return reply end
call('HSET', key, 'incarnation', ARGV[3], 'number', ARGV[4], unpack(ARGV, 5))
call('PEXPIRE', key, ttl)
return reply
