-- lease: writes or removes a node's lease. Allowed when Redis is full.
--
-- KEYS  barid:node:<id>
-- ARGV  'hold' | 'release', ttl ms, incarnation, number, then names and values of the other fields.
-- Reply {1 done, 0 refused; incarnation and number that stood there, 0 and 0: nothing}.
--
-- A later writing is never undone by an earlier one: a higher incarnation, or a higher number of the
-- same one, refuses. A lower incarnation is a former life, which a failover may bring back.

local key, verb, ttl = KEYS[1], ARGV[1], ARGV[2]
local life, number = tonumber(ARGV[3]), tonumber(ARGV[4])
local stood = call('HMGET', key, 'incarnation', 'number')
local stood_life, stood_number = tonumber(stood[1] or 0), tonumber(stood[2] or 0)
local reply = { 1, int(stood_life), int(stood_number) }
if stood_life > life or (stood_life == life and stood_number > number) then
  reply[1] = 0
  return reply
end
if stood_life ~= life or verb == 'release' then call('DEL', key) end
if verb == 'release' then return reply end
call('HSET', key, 'incarnation', ARGV[3], 'number', ARGV[4], unpack(ARGV, 5))
call('PEXPIRE', key, ttl)
return reply
