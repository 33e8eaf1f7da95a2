-- The floor of accept: leaves the same state in Redis as accept does, without any check. It ignores the
-- log position, duplicates, expiry, age and collapse keys; a user has at most one device; an error in one
-- message fails the batch. It reads only what it needs for writing: the state, the newest ids, the route
-- and its device.
--
-- KEYS  positions, timers; then per message: head, queue, routes.
-- ARGV  entries_max, expiry ms, due after ms, epoch, source, position; then per message: member,
--       8-byte id hash, CRC-32 of the id, body.
-- Reply per message: header, and '1' if the user is online.

local call, pack, parse = redis.call, struct.pack, struct.unpack
local KEYS, ARGV = KEYS, ARGV
local STATE = '<HI7I6II6II6I6I6BII'
local byte = string.byte
local TIME = call('TIME')
local NOW_US = TIME[1] * 1000000 + TIME[2]
local NOW = math.floor(NOW_US / 1000)
local MAX, TTL = tonumber(ARGV[1]), tonumber(ARGV[2])
local BASE, EPOCH = tonumber(ARGV[3]), tonumber(ARGV[4])
local replies, k, a = {}, 3, 7
for m = 1, (#KEYS - 2) / 3 do
  local head, queue = KEYS[k], KEYS[k + 1]
  local device = call('HKEYS', KEYS[k + 2])[1]
  local v = device and call('HMGET', head, 's', 'i', 'd:' .. device)
    or call('HMGET', head, 's', 'i')
  local mark, e, b, bc, n, nc, kl, dc, bt, nt = 3, EPOCH, 1, 0, 0, 0, 0, 0, 0, 0
  local x, ct = NOW + TTL, NOW + TTL
  if v[1] then mark, e, b, bc, n, nc, x, ct, kl, dc, bt, nt = parse(STATE, v[1]) end
  n = n + 1
  local chain = (bit.rol(bit.bxor(nc, ARGV[a + 2]), 13) * 5 + 0xe6546b64) % 4294967296
  nt = (nt + 37 + #ARGV[a + 3]) % 4294967296
  local header = pack('<BI8BI8BIBIBI8I', 9, e, 17, n, 29, nc, 37, chain, 41, NOW_US, nt)
  local length = call('RPUSH', queue, header, ARGV[a + 3])
  if length == 2 then
    ct = NOW + TTL
    call('PEXPIREAT', queue, string.format('%d', x))
  end
  if length > 2 * MAX then
    local oldest = call('LINDEX', queue, '0')
    bc, bt = parse('<I', oldest, 25), parse('<I', oldest, 38)
    call('LTRIM', queue, '2', '-1')
    b = b + 1
  end
  local ids = (v[2] or '') .. ARGV[a + 1]
  if #ids == 64 then
    local marks = call('HGET', head, 'f') or '\0'
    local next = byte(marks)
    call('HSET', head, 'j' .. next, ids, 'f', string.char((next + 1) % 7)
      .. string.sub(marks, 2, next * 8 + 1) .. string.char(byte(ids), byte(ids, 9), byte(ids, 17), byte(ids, 25),
        byte(ids, 33), byte(ids, 41), byte(ids, 49), byte(ids, 57))
      .. string.sub(marks, next * 8 + 10))
    ids = ''
  end
  local state = pack(STATE, mark, e, b, bc, n, chain, x, ct, kl, dc, bt, nt)
  if device then
    if parse('<I6', v[3], 17) == 0 then
      local due = NOW + BASE
      call('HSET', head, 's', state, 'i', ids,
        'd:' .. device, pack('<c16I6c0', v[3], due, string.sub(v[3], 23)))
      call('ZADD', KEYS[2], string.format('%d', due), ARGV[a])
    else
      call('HSET', head, 's', state, 'i', ids)
    end
    replies[m] = header .. '1'
  else
    call('HSET', head, 's', state, 'i', ids)
    if n == 1 then call('PEXPIREAT', head, string.format('%d', x)) end
    replies[m] = header
  end
  k, a = k + 3, a + 4
end
call('HSET', KEYS[1], ARGV[5], ARGV[6])
return replies
