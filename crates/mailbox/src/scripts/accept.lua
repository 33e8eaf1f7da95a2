-- accept: appends messages to mailboxes, in the order of the log. Not allowed when Redis is full.
--
-- KEYS  a group: positions {s}:o, timers {s}:t; then each of its users: head, queue, routes.
-- ARGV  entries_max, ttl ms, retry base ms, retry jitter, epoch candidate, groups; then
--       a group: source; packed (GROUP), 1 if there is a prev else 0, its leader epoch, offset and
--       index, messages, users, all arguments of the group; packed one behind the other (MESSAGE), of
--       each message: leader epoch, offset, index, user (from 0), 8-byte id hash, CRC-32 of the id, 1
--       if there is a collapse key else 0; then the members (app NUL user) of its users; then of each
--       message: its body, and its collapse key, if there is one.
-- Reply now, then a group: {'G', position or false} a batch in between was never executed, nothing
--       was written; {'E', text} the shard's positions cannot be read; or {'D', a letter a message, a
--       user each (MAILBOX): epoch, seq and chain before the first that is accepted now, evicted
--       entries; then the text of each 'F'}. The letters:
--       'A' accepted; 'O' accepted, and the user is online
--       'B' this position was passed before
--       'D' another record with this id was accepted
--       'F' it failed, nothing was written for it
--
-- The position "leader offset index" of a source moves with the appends: nothing but this script
-- runs between them and the end of the group, and no error passes over it. A user's messages are
-- appended at once, so they fail together. What failed is noted in the field "<source>!" (the last
-- 32): redelivered, it is told to have failed, not to be accepted.
-- An error after the append (timers, trim) must not undo it: those run in a pcall of their own.

local ENTRIES_MAX, TTL = tonumber(ARGV[1]), tonumber(ARGV[2])
local BASE, JITTER, CANDIDATE = tonumber(ARGV[3]), tonumber(ARGV[4]), ARGV[5]
local NEW_IDS_BYTES, OLD_IDS_BYTES, MARKS_BYTES, FAILED_BYTES_MAX = 16 * 8, 64 * 8, 64 * 2, 2048
local VOIDED_COLLAPSED = '\128\1\4' -- Envelope.voided = SKIP_REASON_COLLAPSED
local GROUP, MESSAGE, MESSAGE_BYTES = '<Bi4dI4I4I4I4', '<i4dI4I4c8I4B', 33
local HEADER, MAILBOX = '<BI8BI8BI4BI4BI8', '<ddI4I4'
local NOT_ACCEPTED = pack(MAILBOX, 0, 0, 0, 0)
local PUSH_MAX = 1000 -- elements of a list in one call: Lua unpacks a few thousand at most
local find, sub, unpack = string.find, string.sub, unpack

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

-- The newest ids as they are kept: when they are too many they join the old ones.
local function keep_ids(head, ids, marks)
  if #ids < NEW_IDS_BYTES then return ids end
  local more = string.gsub(ids, '(..)......', '%1')
  call('HSET', head, 'j', sub((call('HGET', head, 'j') or '') .. ids, -OLD_IDS_BYTES),
    'f', sub((marks or '') .. more, -MARKS_BYTES))
  return ''
end

-- The entry at `seq` has a collapse key: the older one keeps its place and loses its content.
local function collapse(h, queue, seq, key)
  local old = tonumber(call('HGET', h.key, 'k:' .. key))
  if old and old >= h.b and old < seq then
    call('LSET', queue, int((old - h.b) * 2 + 1), VOIDED_COLLAPSED)
  end
  call('HSET', h.key, 'k:' .. key, int(seq))
  if h.kl == 0 then h.kl = seq end
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

-- The mailbox as `pushed` new entries leave it. `keyed`: the seq and the collapse key of each that has
-- one. Returns how many were evicted.
local function tidy(h, queue, kept, pushed, keyed)
  if kept ~= h.n - h.b + 1 then -- entries were lost from the front: the list is right
    local epoch, _, seq, _, before = parse('<I8BI8BI4', call('LINDEX', queue, '0'), 2)
    h.b, h.bc = seq, before
  end
  if kept == pushed then
    call('PEXPIREAT', queue, int(h.x))
    h.ct = NOW + TTL
  end
  for at = 1, keyed and #keyed or 0, 2 do collapse(h, queue, keyed[at], keyed[at + 1]) end
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

-- Appends entries, header and body in turn. Returns how many entries the list has.
local function append(queue, parts)
  local length
  for first = 1, #parts, PUSH_MAX do
    length = call('RPUSH', queue, unpack(parts, first, math.min(first + PUSH_MAX - 1, #parts)))
  end
  return length / 2
end

-- Accepts a user's messages: in `list` the number of each, its id hash, the id's CRC-32, where its body
-- is, and 1 if a collapse key stands behind that. Sets the letters; returns the user's part of the reply.
local function accept(k, member, list, letters, timers)
  local head, queue = KEYS[k], KEYS[k + 1]
  local names = call('HKEYS', KEYS[k + 2])
  local online = #names > 0
  local accepted = online and 'O' or 'A'
  local v = fetch(head, names)
  local h = v[1] and parse_head(head, v[1]) or new_head(head, queue, CANDIDATE)
  if h.x - NOW < TTL then renew(h, queue, TTL) end
  local ids, marks = v[2] or '', v[3]
  local e, n, chain, parts, keyed = h.e, h.n, h.nc, {}, nil
  local first, before = n, chain
  for at = 1, #list, 5 do
    local hash = list[at + 1]
    if is_duplicate(head, ids, marks, hash) then
      letters[list[at]] = 'D'
    else
      local body, from = list[at + 3], chain
      n, chain, ids = n + 1, chain_step(chain, list[at + 2]), ids .. hash
      local i = (n - first) * 2
      parts[i - 1] = pack(HEADER, 0x09, e, 0x11, n, 0x1d, from, 0x25, chain, 0x29, NOW_US)
      parts[i] = ARGV[body]
      letters[list[at]] = accepted
      if list[at + 4] == 1 then
        keyed = keyed or {}
        keyed[#keyed + 1], keyed[#keyed + 2] = n, ARGV[body + 1]
      end
    end
  end
  local pushed, evicted = n - first, 0
  if pushed == 0 then return NOT_ACCEPTED end
  local kept = append(queue, parts)
  h.n, h.nc = n, chain

  if keyed or kept ~= n - h.b + 1 or kept == pushed or kept > ENTRIES_MAX or NOW >= h.ct then
    local ok, result = pcall(tidy, h, queue, kept, pushed, keyed)
    if ok then evicted = result else log_problem(result) end
  end
  ids = keep_ids(head, ids, marks)
  local ok, field, state = online
  if ok then
    ok, field, state = pcall(arm, h, timers, member, names, v)
    if not ok then log_problem(field) end
  end
  if ok and field then
    call('HSET', head, 's', head_state(h), 'i', ids, field, state)
  else
    call('HSET', head, 's', head_state(h), 'i', ids)
  end
  return pack(MAILBOX, e, first, before, evicted)
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

-- Sorts a group's messages by user. Returns a list for each user that has any, the letters of those
-- that are passed over, and the position behind all; nil where nothing is new.
local function sort(source, positions, metas, count, body, l, o, i)
  local lists, letters, at, failed, moved = {}, {}, 1, nil, false
  for m = 1, count do
    local ml, mo, mi, user, hash, crc, keyed
    ml, mo, mi, user, hash, crc, keyed, at = parse(MESSAGE, metas, at)
    if after(ml, mo, mi, l, o, i) then
      l, o, i, moved = ml, mo, mi, true
      local list = lists[user]
      if list then
        local n = #list
        list[n + 1], list[n + 2], list[n + 3], list[n + 4], list[n + 5] = m, hash, crc, body, keyed
      else
        lists[user] = { m, hash, crc, body, keyed }
      end
    else
      failed = failed or call('HGET', positions, source .. '!') or ''
      local before = find(failed, '\n' .. position_text(ml, mo, mi) .. '\n', 1, true)
      letters[m] = before and 'F' or 'B'
    end
    body = body + 1 + keyed
  end
  return lists, letters, moved and position_text(l, o, i)
end

local function group(k, a)
  local positions, timers, source = KEYS[k], KEYS[k + 1], ARGV[a]
  local has_prev, pl, po, pi, count, users = parse(GROUP, ARGV[a + 1])
  local stored = call('HGET', positions, source)
  local l, o, i = match(stored or '-2 -1 0', '^(-?%d+) (-?%d+) (%d+)$')
  if not l then error('corrupt position') end
  l, o, i = tonumber(l), tonumber(o), tonumber(i)
  if has_prev == 1 and after(pl, po, pi, l, o, i) then return { 'G', stored } end
  local metas = ARGV[a + 2]
  local lists, letters, position =
    sort(source, positions, metas, count, a + 3 + users, l, o, i)
  local mailboxes, problems = {}, {}
  local user = 0
  local function rest() -- until one fails: a pcall for each would cost more
    while user < users do
      local list = lists[user]
      mailboxes[user + 1] = list
        and accept(k + 2 + user * 3, ARGV[a + 3 + user], list, letters, timers) or NOT_ACCEPTED
      user = user + 1
    end
  end
  while user < users do
    local ok, problem = pcall(rest)
    if not ok then
      mailboxes[user + 1] = NOT_ACCEPTED
      for at = 1, #lists[user], 5 do
        local m = lists[user][at]
        letters[m], problems[m] = 'F', problem_text(problem)
        local ml, mo, mi = parse(MESSAGE, metas, (m - 1) * MESSAGE_BYTES + 1)
        note_failure(positions, source, position_text(ml, mo, mi))
      end
      user = user + 1
    end
  end
  if position then call('HSET', positions, source, position) end
  local reply = { 'D', table.concat(letters), table.concat(mailboxes) }
  for m = 1, count do
    if letters[m] == 'F' then
      reply[#reply + 1] = problems[m] or 'failed when it was accepted first'
    end
  end
  return reply
end

local replies, k, a = { NOW_US }, 1, 7
for g = 1, tonumber(ARGV[6]) do
  local _, _, _, _, _, users, arguments = parse(GROUP, ARGV[a + 1])
  local ok, reply = pcall(group, k, a)
  if not ok then reply = { 'E', problem_text(reply) } end
  replies[g + 1] = reply
  k, a = k + 2 + users * 3, a + arguments
end
return replies
