-- accept: appends messages to mailboxes, in the order of the log. Not allowed when Redis is full.
--
-- KEYS  a group: positions {s}:o, timers {s}:t; then each of its messages: head, queue, routes.
-- ARGV  entries_max, ttl ms, retry base ms, retry jitter, groups; then
--       a group: source, 1 if there is a prev else 0, its leader epoch, offset, index, messages;
--       a message: leader epoch, offset, index, member (app NUL user), collapse key or '',
--       8-byte id hash, CRC-32 of the id, epoch candidate, body.
-- Reply now, then a group: {'G', position or false} a batch in between was never executed, nothing
--       was written; {'E', text} the shard's positions cannot be read; or {'D', a message each}:
--       'A' header online(1 byte) evicted(4 bytes LE)   accepted
--       'B'                                             this position was passed before
--       'D'                                             another record with this id was accepted
--       'F' text                                        it failed, nothing was written for it
--
-- The position "leader offset index" of a source moves after each append. What failed is noted in
-- the field "<source>!" (the last 32): redelivered, it is told to have failed, not to be accepted.
-- An error after the append (timers, trim) must not undo it: those run in a pcall of their own.

local ENTRIES_MAX, TTL = tonumber(ARGV[1]), tonumber(ARGV[2])
local BASE, JITTER = tonumber(ARGV[3]), tonumber(ARGV[4])
local RING_BYTES, FAILED_BYTES_MAX = 64 * 8, 2048
local VOIDED_COLLAPSED = '\128\1\4' -- Envelope.voided = SKIP_REASON_COLLAPSED

local function after(l1, o1, i1, l2, o2, i2)
  if l1 ~= l2 then return l1 > l2 end
  if o1 ~= o2 then return o1 > o2 end
  return i1 > i2
end

-- Whether the ring holds the hash at a multiple of eight.
local function in_ring(ring, hash)
  local at = string.find(ring, hash, 1, true)
  while at do
    if (at - 1) % 8 == 0 then return true end
    at = string.find(ring, hash, at + 1, true)
  end
  return false
end

-- The older entry of the collapse key keeps its place and loses its content.
local function collapse(h, queue, key)
  local old = tonumber(call('HGET', h.key, 'k:' .. key))
  if old and old >= h.b and old < h.n then
    local index = int(old - h.b)
    local entry = call('LINDEX', queue, index)
    call('LSET', queue, index, string.sub(entry, 1, 37) .. VOIDED_COLLAPSED)
  end
  call('HSET', h.key, 'k:' .. key, int(h.n))
  if not h.kl then
    h.kl = h.n
    call('HSET', h.key, 'kl', int(h.n))
  end
end

-- Evicts what is too much or too old, never the newest. Returns how many.
local function evict(h, queue, check_at)
  local seq, chain = h.b - 1, h.bc
  while h.n - seq > ENTRIES_MAX do
    seq = seq + 1
    chain = entry_chain(call('LINDEX', queue, int(seq - h.b)))
  end
  if NOW >= check_at then
    local next_check
    while seq + 1 < h.n do
      local entry = call('LINDEX', queue, int(seq + 1 - h.b))
      local expires = floor(struct.unpack('<I8', entry, 30) / 1000) + TTL
      if expires > NOW then
        next_check = expires
        break
      end
      seq, chain = seq + 1, entry_chain(entry)
    end
    call('HSET', h.key, 'ct', int(next_check or NOW + TTL))
  end
  local evicted = seq - h.b + 1
  trim(h, queue, seq, chain)
  return evicted
end

-- Arms every routed device that is not armed: it was not behind before this entry.
local function arm(h, timers, member, names)
  local fields, devices, armed = {}, {}, false
  for i, name in ipairs(names) do fields[i] = 'd:' .. name end
  local texts = call('HMGET', h.key, unpack(fields))
  for i, name in ipairs(names) do
    local d
    if texts[i] then
      d = parse_device(name, texts[i])
    else -- the head was forgotten or expired under a living route
      d = { name = name, seq = h.b - 1, chain = h.bc, generation = 0, due = 0, attempt = 0,
        used = NOW, fence = 0 }
      h.ds = h.ds == '' and name or h.ds .. '\0' .. name
      call('HSET', h.key, 'ds', h.ds)
    end
    if d.due == 0 then
      d.due, d.attempt, armed = NOW + spread(BASE, JITTER), 0, true
      save_device(h, d)
    end
    devices[i] = d
  end
  if armed then set_timer(timers, member, devices) end
end

local function accept(k, a, timers)
  local head, queue, routes = KEYS[k], KEYS[k + 1], KEYS[k + 2]
  local member, key, hash, body = ARGV[a + 3], ARGV[a + 4], ARGV[a + 5], ARGV[a + 8]
  local online = call('HKEYS', routes)
  local h = open_head(head, queue, ARGV[a + 7], TTL, 'i', 'ct')
  local ring = h.more1 or ''
  if in_ring(ring, hash) then return 'D' end

  local chain = chain_step(h.nc, tonumber(ARGV[a + 6]))
  local header = struct.pack('<BI8BI8BI4BI4BI8',
    0x09, h.e, 0x11, h.n + 1, 0x1d, h.nc, 0x25, chain, 0x29, NOW_US)
  local length = call('RPUSH', queue, header .. body)
  h.n, h.nc = h.n + 1, chain
  call('HSET', head, 'n', int(h.n), 'nc', int(chain),
    'i', string.sub(ring .. hash, -RING_BYTES))

  local evicted = 0
  local ok, problem = pcall(function()
    if length ~= h.n - h.b + 1 then -- entries were lost from the front: the list is right
      local epoch, _, seq, _, before =
        struct.unpack('<I8BI8BI4', call('LINDEX', queue, 0), 2)
      h.b, h.bc = seq, before
      call('HSET', head, 'b', int(seq), 'bc', int(before))
    end
    local check_at = tonumber(h.more2)
    if h.b == h.n then
      call('PEXPIREAT', queue, int(h.x))
      check_at = NOW + TTL
      call('HSET', head, 'ct', int(check_at))
    end
    if key ~= '' then collapse(h, queue, key) end
    evicted = evict(h, queue, check_at or 0)
    if #online > 0 then arm(h, timers, member, online) end
  end)
  if not ok then
    redis.log(redis.LOG_WARNING, 'barid accept, after the append: ' ..
      (type(problem) == 'table' and problem.err or tostring(problem)))
  end
  return 'A' .. header .. (#online > 0 and '\1' or '\0') .. struct.pack('<I4', evicted)
end

local function note_failure(positions, source, position)
  local field = source .. '!'
  local failed = (call('HGET', positions, field) or '\n') .. position .. '\n'
  call('HSET', positions, field, string.sub(failed, -FAILED_BYTES_MAX))
end

local function group(k, a, count)
  local positions, timers, source = KEYS[k], KEYS[k + 1], ARGV[a]
  local stored = call('HGET', positions, source)
  local l, o, i = match(stored or '-2 -1 0', '^(-?%d+) (-?%d+) (%d+)$')
  l, o, i = tonumber(l), tonumber(o), tonumber(i)
  if ARGV[a + 1] == '1'
    and after(tonumber(ARGV[a + 2]), tonumber(ARGV[a + 3]), tonumber(ARGV[a + 4]), l, o, i) then
    return { 'G', stored }
  end
  local reply = { 'D' }
  local failed
  for m = 0, count - 1 do
    local mk, ma = k + 2 + m * 3, a + 6 + m * 9
    local ml, mo, mi = tonumber(ARGV[ma]), tonumber(ARGV[ma + 1]), tonumber(ARGV[ma + 2])
    local position = ARGV[ma] .. ' ' .. ARGV[ma + 1] .. ' ' .. ARGV[ma + 2]
    if after(ml, mo, mi, l, o, i) then
      local ok, result = pcall(accept, mk, ma, timers)
      if not ok then
        result = 'F' .. (type(result) == 'table' and result.err or tostring(result))
        note_failure(positions, source, position)
      end
      call('HSET', positions, source, position)
      l, o, i = ml, mo, mi
      reply[m + 2] = result
    else
      failed = failed or call('HGET', positions, source .. '!') or ''
      local before = string.find(failed, '\n' .. position .. '\n', 1, true)
      reply[m + 2] = before and 'Ffailed when it was accepted first' or 'B'
    end
  end
  return reply
end

local replies, k, a = { NOW_US }, 1, 6
for g = 1, tonumber(ARGV[5]) do
  local count = tonumber(ARGV[a + 5])
  local ok, reply = pcall(group, k, a, count)
  if not ok then
    reply = { 'E', type(reply) == 'table' and reply.err or tostring(reply) }
  end
  replies[g + 1] = reply
  k, a = k + 2 + count * 3, a + 6 + count * 9
end
return replies
