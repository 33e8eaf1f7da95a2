-- accept: appends messages to mailboxes, in the order of the log. Not allowed when Redis is full.
--
-- KEYS  a group: positions {s}:o, timers {s}:t; then each of its messages: head, queue, routes.
-- ARGV  entries_max, ttl ms, retry base ms, retry jitter, epoch candidate, groups; then
--       a group: source, 1 if there is a prev else 0, its leader epoch, offset, index, messages;
--       a message: its body, and, packed (MESSAGE), leader epoch, offset, index, 8-byte id hash,
--       CRC-32 of the id, length of the member; behind that the member (app NUL user) and the
--       collapse key, if there is one.
-- Reply now, then a group: {'G', position or false} a batch in between was never executed, nothing
--       was written; {'E', text} the shard's positions cannot be read; or {'D', a message each}:
--       'A' header [evicted(4 bytes LE)]   accepted; 'O': and the user is online
--       'B'                                this position was passed before
--       'D'                                another record with this id was accepted
--       'F' text                           it failed, nothing was written for it
--
-- The position "leader offset index" of a source moves with the appends: nothing but this script
-- runs between them and the end of the group, and no error passes over it. What failed is noted in
-- the field "<source>!" (the last 32): redelivered, it is told to have failed, not to be accepted.
-- An error after the append (timers, trim) must not undo it: those run in a pcall of their own.

local ENTRIES_MAX, TTL = tonumber(ARGV[1]), tonumber(ARGV[2])
local BASE, JITTER, CANDIDATE = tonumber(ARGV[3]), tonumber(ARGV[4]), ARGV[5]
local NEW_IDS_BYTES, OLD_IDS_BYTES, MARKS_BYTES, FAILED_BYTES_MAX = 16 * 8, 64 * 8, 64 * 2, 2048
local VOIDED_COLLAPSED = '\128\1\4' -- Envelope.voided = SKIP_REASON_COLLAPSED
local MESSAGE, HEADER = '<i4dI4c8I4I2', '<BI8BI8BI4BI4BI8'
local find, sub = string.find, string.sub

-- Whether one of these ids is at a multiple of eight.
local function has_id(ids, hash)
  local at = find(ids, hash, 1, true)
  while at do
    if (at - 1) % 8 == 0 then return true end
    at = find(ids, hash, at + 1, true)
  end
  return false
end

-- Whether a message with this id is among the last that were accepted.
local function is_duplicate(head, ids, marks, hash)
  return has_id(ids, hash) or (marks and find(marks, sub(hash, 1, 2), 1, true)
    and has_id(call('HGET', head, 'j'), hash))
end

-- The newest ids, with one more. When they are too many they join the old ones.
local function add_id(head, ids, marks, hash)
  ids = ids .. hash
  if #ids < NEW_IDS_BYTES then return ids end
  local more = string.gsub(ids, '(..)......', '%1')
  call('HSET', head, 'j', sub((call('HGET', head, 'j') or '') .. ids, -OLD_IDS_BYTES),
    'f', sub((marks or '') .. more, -MARKS_BYTES))
  return ''
end

-- The older entry of the collapse key keeps its place and loses its content.
local function collapse(h, queue, key)
  local old = tonumber(call('HGET', h.key, 'k:' .. key))
  if old and old >= h.b and old < h.n then
    call('LSET', queue, int((old - h.b) * 2 + 1), VOIDED_COLLAPSED)
  end
  call('HSET', h.key, 'k:' .. key, int(h.n))
  if h.kl == 0 then h.kl = h.n end
end

-- Evicts what is too much or too old, never the newest. Returns how many.
local function evict(h, queue)
  local seq, chain = h.b - 1, h.bc
  while h.n - seq > ENTRIES_MAX do
    seq = seq + 1
    chain = header_chain(header_at(h, queue, seq))
  end
  if NOW >= h.ct then
    h.ct = NOW + TTL
    while seq + 1 < h.n do
      local header = header_at(h, queue, seq + 1)
      local expires = floor(parse('<I8', header, 30) / 1000) + TTL
      if expires > NOW then
        h.ct = expires
        break
      end
      seq, chain = seq + 1, header_chain(header)
    end
  end
  local evicted = seq - h.b + 1
  trim(h, queue, seq, chain)
  return evicted
end

-- The mailbox as the new entry leaves it. Returns how many were evicted.
local function tidy(h, queue, kept, key)
  if kept ~= h.n - h.b + 1 then -- entries were lost from the front: the list is right
    local epoch, _, seq, _, before = parse('<I8BI8BI4', call('LINDEX', queue, '0'), 2)
    h.b, h.bc = seq, before
  end
  if h.b == h.n then
    call('PEXPIREAT', queue, int(h.x))
    h.ct = NOW + TTL
  end
  if key ~= '' then collapse(h, queue, key) end
  return evict(h, queue)
end

-- Arms every routed device that is not armed: it was not behind before this entry. The last of them
-- is saved by the caller: returns its field and its state.
local function arm(h, timers, member, names, v)
  local earliest, field, state
  for i, name in ipairs(names) do
    local seq, chain, generation, due, attempt, used, fence = h.b - 1, h.bc, 0, 0, 0, NOW, 0
    local text = v[i + 3]
    if text then
      seq, chain, generation, due, attempt, used, fence = parse(DEVICE, text)
    else -- the head was forgotten or expired under a living route
      local known = call('HGET', h.key, 'ds')
      call('HSET', h.key, 'ds', known and known ~= '' and known .. '\0' .. name or name)
      h.dc = h.dc + 1
    end
    if due == 0 then
      if field then call('HSET', h.key, field, state) end
      due = NOW + spread(BASE, JITTER)
      field, state = 'd:' .. name, pack(DEVICE, seq, chain, generation, due, 0, used, fence)
    end
    if not earliest or due < earliest then earliest = due end
  end
  if field then call('ZADD', timers, int(earliest), member) end
  return field, state
end

local function log_problem(problem)
  redis.log(redis.LOG_WARNING, 'barid accept, after the append: ' .. problem_text(problem))
end

-- The head's state, newest ids and marks of old ones, and the devices with these names.
local function fetch(head, names)
  if #names == 0 then return call('HMGET', head, 's', 'i', 'f') end
  if #names == 1 then return call('HMGET', head, 's', 'i', 'f', 'd:' .. names[1]) end
  local fields = {}
  for i, name in ipairs(names) do fields[i] = 'd:' .. name end
  return call('HMGET', head, 's', 'i', 'f', unpack(fields))
end

local function accept(k, a, timers, hash, crc, member_bytes, member_at)
  local head, queue = KEYS[k], KEYS[k + 1]
  local names = call('HKEYS', KEYS[k + 2])
  local online = #names > 0
  local v = fetch(head, names)
  local h = v[1] and parse_head(head, v[1]) or new_head(head, queue, CANDIDATE)
  if h.x - NOW < TTL then renew(h, queue, TTL) end
  local ids, marks = v[2] or '', v[3]
  if is_duplicate(head, ids, marks, hash) then return 'D' end

  local chain = chain_step(h.nc, crc)
  local header = pack(HEADER, 0x09, h.e, 0x11, h.n + 1, 0x1d, h.nc, 0x25, chain, 0x29, NOW_US)
  local kept = call('RPUSH', queue, header, ARGV[a]) / 2
  h.n, h.nc = h.n + 1, chain

  local meta, evicted = ARGV[a + 1], 0
  local key_at = member_at + member_bytes
  if kept ~= h.n - h.b + 1 or kept == 1 or kept > ENTRIES_MAX or NOW >= h.ct or #meta >= key_at then
    local ok, result = pcall(tidy, h, queue, kept, sub(meta, key_at))
    if ok then evicted = result else log_problem(result) end
  end
  ids = add_id(head, ids, marks, hash)
  local ok, field, state = online
  if ok then
    ok, field, state = pcall(arm, h, timers, sub(meta, member_at, key_at - 1), names, v)
    if not ok then log_problem(field) end
  end
  if ok and field then
    call('HSET', head, 's', head_state(h), 'i', ids, field, state)
  else
    call('HSET', head, 's', head_state(h), 'i', ids)
  end
  local reply = (online and 'O' or 'A') .. header
  return evicted > 0 and reply .. pack('<I4', evicted) or reply
end

local function note_failure(positions, source, position)
  local field = source .. '!'
  local failed = (call('HGET', positions, field) or '\n') .. position .. '\n'
  call('HSET', positions, field, sub(failed, -FAILED_BYTES_MAX))
end

local function after(l1, o1, i1, l2, o2, i2)
  if l1 ~= l2 then return l1 > l2 end
  if o1 ~= o2 then return o1 > o2 end
  return i1 > i2
end

local function position_text(l, o, i)
  return string.format('%d %d %d', l, o, i)
end

local function group(k, a, count)
  local positions, timers, source = KEYS[k], KEYS[k + 1], ARGV[a]
  local stored = call('HGET', positions, source)
  local l, o, i = match(stored or '-2 -1 0', '^(-?%d+) (-?%d+) (%d+)$')
  if not l then error('corrupt position') end
  l, o, i = tonumber(l), tonumber(o), tonumber(i)
  if ARGV[a + 1] == '1'
    and after(tonumber(ARGV[a + 2]), tonumber(ARGV[a + 3]), tonumber(ARGV[a + 4]), l, o, i) then
    return { 'G', stored }
  end
  local reply, failed, m, begun = { 'D' }, nil, 0, -1
  local function rest() -- until one fails: a pcall for each would cost more
    while m < count do
      local mk, ma = k + 2 + m * 3, a + 6 + m * 2
      local ml, mo, mi, hash, crc, member_bytes, member_at = parse(MESSAGE, ARGV[ma + 1])
      if after(ml, mo, mi, l, o, i) then
        l, o, i, begun = ml, mo, mi, m
        reply[m + 2] = accept(mk, ma, timers, hash, crc, member_bytes, member_at)
      else
        failed = failed or call('HGET', positions, source .. '!') or ''
        local before = find(failed, '\n' .. position_text(ml, mo, mi) .. '\n', 1, true)
        reply[m + 2] = before and 'Ffailed when it was accepted first' or 'B'
      end
      m = m + 1
    end
  end
  while m < count do
    local ok, problem = pcall(rest)
    if not ok then
      reply[m + 2] = 'F' .. problem_text(problem)
      if begun == m then note_failure(positions, source, position_text(l, o, i)) end
      m = m + 1
    end
  end
  if begun >= 0 then call('HSET', positions, source, position_text(l, o, i)) end
  return reply
end

local replies, k, a = { NOW_US }, 1, 7
for g = 1, tonumber(ARGV[6]) do
  local count = tonumber(ARGV[a + 5])
  local ok, reply = pcall(group, k, a, count)
  if not ok then reply = { 'E', problem_text(reply) } end
  replies[g + 1] = reply
  k, a = k + 2 + count * 3, a + 6 + count * 2
end
return replies
