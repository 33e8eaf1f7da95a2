-- The floor of ack: leaves the same state in Redis as ack does for a user's only device, without any
-- check. It ignores epoch, generation, chain, other devices, expiry and the session; an error in one item
-- fails the batch.
--
-- KEYS  timers; then per item: head, queue.
-- ARGV  due after ms; then per item: member, the device's field, seq, chain.
-- Reply per item: its seq.

local call, pack, parse = redis.call, struct.pack, struct.unpack
local KEYS, ARGV = KEYS, ARGV
local STATE, DEVICE = '<HI7I6II6II6I6I6BII', '<HI6III6BI6I7B'
local TIME = call('TIME')
local NOW = TIME[1] * 1000 + math.floor(TIME[2] / 1000)
local replies, k, a = {}, 2, 2
for m = 1, (#KEYS - 1) / 2 do
  local head, queue, field = KEYS[k], KEYS[k + 1], ARGV[a + 1]
  local seq, chain = tonumber(ARGV[a + 2]), tonumber(ARGV[a + 3])
  local v = call('HMGET', head, 's', field)
  local mark, e, b, _, n, nc, x, ct, kl, dc, bt, nt = parse(STATE, v[1])
  local _, _, _, generation, _, _, _, fence = parse(DEVICE, v[2])
  local due = 0
  if seq == n then
    call('DEL', queue)
    call('ZREM', KEYS[1], ARGV[a])
  else
    call('LTRIM', queue, string.format('%d', (seq - b + 1) * 2), '-1')
    due = NOW + ARGV[1]
    call('ZADD', KEYS[1], string.format('%d', due), ARGV[a])
  end
  call('HSET', head, 's', pack(STATE, mark, e, seq + 1, chain, n, nc, x, ct, kl, dc, bt, nt),
    field, pack(DEVICE, mark, seq, chain, generation, due, 0, NOW, fence, 0))
  replies[m] = seq
  k, a = k + 2, a + 4
end
return replies
