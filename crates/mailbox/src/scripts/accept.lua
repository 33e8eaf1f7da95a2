-- accept: appends messages to mailboxes, in the order of the log. Not allowed when Redis is full.
--
-- KEYS  a group: positions {s}:o, timers {s}:t, leases' copies {s}:n; then each of its users: head, queue,
--       routes.
-- ARGV  entries_max, mailbox_bytes_max, ttl ms, retry base ms, retry jitter, epoch candidate, keep ms (after
--       a loss), groups; then
--       a group: source; packed (GROUP), 1 if there is a prev else 0, plus 2 if an empty group raises
--         the stored position to its last one; prev, its first and its last position, how many users
--         and how many arguments it has; packed, how many messages are for each user (I4); packed,
--         of each message (MESSAGE): 8-byte id hash, CRC-32 of the id, 1 if
--         there is a collapse key else 0, position; then the members (app NUL user) of its users; then
--         of each message: its body, and its collapse key, if there is one. A user's messages stand
--         together, in the order of the log.
--       A position: leader epoch, offset, index.
-- Reply now, then a group: {'G', position or false} a batch in between was never executed, or Redis has
--       forgotten it: only the time of this answer was written (LOST); {'U'} a mailbox in it must not
--       be touched by this version, nothing was written; {'E', text} the shard's positions cannot be
--       read; or {'D', a letter a message, a user each (MAILBOX): epoch, seq and chain before the first
--       that is accepted now, evicted entries; then the text of each 'F'}. The letters:
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

local ENTRIES_MAX, BYTES_MAX, TTL = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3])
local BASE, JITTER, CANDIDATE, KEEP = tonumber(ARGV[4]), tonumber(ARGV[5]), ARGV[6], tonumber(ARGV[7])
local ID_BYTES, CHUNK_IDS, CHUNKS, FAILED_BYTES_MAX = 8, 8, 7, 2048
local CHUNK_BYTES = ID_BYTES * CHUNK_IDS
local VOIDED_COLLAPSED = '\128\1\4' -- Envelope.voided = SKIP_REASON_COLLAPSED
local GROUP, COUNT, COUNT_BYTES = '<BidIidIidIII', '<I', 4
local MESSAGE, MESSAGE_BYTES, POSITION, POSITION_AT = '<c8IB', 29, '<idI', 14
local HEADER, MAILBOX = '<BI8BI8BIBIBI8I', '<ddII'
local NOT_ACCEPTED = pack(MAILBOX, 0, 0, 0, 0)
-- A device's due time, and what arming writes: due time and attempt, between bytes that stay.
local DUE_AT, ARMED, ARMED_UNTIL = 17, '<c16I6Bc0', 24
local PUSH_MAX = 1000 -- elements of a list in one call: Lua unpacks a few thousand at most
local find, sub, char, unpack = string.find, string.sub, string.char, unpack
local PLAIN = char(VERSION, 0) -- the mark of what has no flags

-- The group under way: its keys, its messages and the letters of those, and the position before it;
-- whether all of it lies behind that, whether any of it has a collapse key, and whether no user has two.
local positions, timers, source, metas, letters
local l0, o0, i0, all_new, has_keys, all_single
-- Until when mailboxes keep what is acknowledged, if nothing was dropped from them yet, because something
-- of the shard was found missing; 0: they do not.
local keep_until

-- Whether one of these ids is at a multiple of eight.
local function has_id(ids, hash)
  local at = find(ids, hash, 1, true)
  while at do
    if (at - 1) % ID_BYTES == 0 then return true end
    at = find(ids, hash, at + 1, true)
  end
  return false
end

-- Whether one of the older ids is this one; `marks` has their first bytes, behind that of the chunk.
local function is_old(head, marks, hash)
  local mark = sub(hash, 1, 1)
  local at = find(marks, mark, 2, true)
  while at do
    local from = (at - 2) % CHUNK_IDS * ID_BYTES
    local chunk = call('HGET', head, 'j' .. floor((at - 2) / CHUNK_IDS))
    if chunk and sub(chunk, from + 1, from + ID_BYTES) == hash then return true end
    at = find(marks, mark, at + 1, true)
  end
  return false
end

-- Whether a message with this id is among the last that were accepted.
local function is_duplicate(head, ids, marks, hash)
  return has_id(ids, hash) or marks and is_old(head, marks, hash)
end

-- The newest ids as they are kept: eight of them are a chunk, which takes the place of the oldest.
local function keep_ids(head, ids, marks)
  if #ids < CHUNK_BYTES then return ids end
  local full = floor(#ids / CHUNK_BYTES)
  local fields, text, slot = full > 1 and {}
  marks = marks or '\0'
  for chunk = math.max(full - CHUNKS, 0), full - 1 do
    local next, at = byte(marks), chunk * CHUNK_BYTES
    text, slot = sub(ids, at + 1, at + CHUNK_BYTES), 'j' .. next
    if fields then fields[#fields + 1], fields[#fields + 2] = slot, text end
    marks = char((next + 1) % CHUNKS) .. sub(marks, 2, next * CHUNK_IDS + 1)
      .. char(byte(text), byte(text, 9), byte(text, 17), byte(text, 25), byte(text, 33),
        byte(text, 41), byte(text, 49), byte(text, 57))
      .. sub(marks, (next + 1) * CHUNK_IDS + 2)
  end
  if fields then
    fields[#fields + 1], fields[#fields + 2] = 'f', marks
    call('HSET', head, unpack(fields))
  else -- the usual case, without a table
    call('HSET', head, slot, text, 'f', marks)
  end
  return sub(ids, full * CHUNK_BYTES + 1)
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
  local seq, chain, bytes = h.b - 1, h.bc, h.bt
  while seq + 1 < h.n and (h.n - seq > ENTRIES_MAX or (h.nt - bytes) % WRAP > BYTES_MAX) do
    seq = seq + 1
    chain, bytes = header_place(header_at(h, queue, seq))
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
      seq = seq + 1
      chain, bytes = header_place(header)
    end
  end
  local evicted = seq - h.b + 1
  trim(h, queue, seq, chain, bytes)
  return evicted
end

-- The mailbox as `pushed` new entries leave it. `keyed`: the seq and the collapse key of each that has
-- one. Returns how many were evicted.
local function tidy(h, queue, kept, pushed, keyed)
  if kept ~= h.n - h.b + 1 then -- entries were lost from the front: the list is right
    local header = call('LINDEX', queue, '0')
    local epoch, _, seq, _, before = parse('<I8BI8BI4', header, 2)
    local _, bytes = header_place(header)
    h.b, h.bc = seq, before
    h.bt = (bytes - HEADER_BYTES - #call('LINDEX', queue, '1')) % WRAP
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
local function arm(h, member, names, v)
  local earliest, field, state
  for i, name in ipairs(names) do
    local text = v[i + 3]
    local d = text and parse_device(name, text) or new_device(h, name, 0)
    if not text then -- the head was forgotten or expired under a living route
      if h.dc >= BYTE_MAX then error('too many devices') end
      d.seq, d.chain = h.b - 1, h.bc
      call('HSET', h.key, 'n' .. h.dc, name)
      h.dc = h.dc + 1
    end
    if d.due == 0 then
      if field then call('HSET', h.key, field, state) end
      d.due, d.attempt = NOW + spread(BASE, JITTER), 0
      field, state = 'd:' .. name, device_state(d)
    end
    if not earliest or d.due < earliest then earliest = d.due end
  end
  if field then call('ZADD', timers, int(earliest), member) end
  return field, state
end

local function log_problem(problem)
  redis.log(redis.LOG_WARNING, 'barid accept, after the append: ' .. problem_text(problem))
end

-- The head's state, newest ids and marks of old ones, and the devices with these names.
local function fetch(head, names)
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

local function after(l1, o1, i1, l2, o2, i2)
  if l1 ~= l2 then return l1 > l2 end
  if o1 ~= o2 then return o1 > o2 end
  return i1 > i2
end

local function position_text(l, o, i)
  return string.format('%d %d %d', l, o, i)
end

local function position_of(m)
  return parse(POSITION, metas, (m - 1) * MESSAGE_BYTES + POSITION_AT)
end

local function is_new(m)
  if all_new then return true end
  local l, o, i = position_of(m)
  return after(l, o, i, l0, o0, i0)
end

-- The letter of a message that was passed before.
local function passed_letter(m)
  local l, o, i = position_of(m)
  local failed = call('HGET', positions, source .. '!') or ''
  return find(failed, '\n' .. position_text(l, o, i) .. '\n', 1, true) and 'F' or 'B'
end

local function note_failure(m)
  local l, o, i = position_of(m)
  local field = source .. '!'
  local failed = (call('HGET', positions, field) or '\n') .. position_text(l, o, i) .. '\n'
  call('HSET', positions, field, sub(failed, -FAILED_BYTES_MAX))
end

-- What follows an append of `pushed` entries: the mailbox's bounds, the ids, the timers, the head. Returns how
-- many entries were evicted.
local function settle(h, queue, member, names, v, kept, pushed, ids, keyed)
  local evicted = 0
  if keyed or kept ~= h.n - h.b + 1 or kept == pushed or kept > ENTRIES_MAX or NOW >= h.ct
    or (h.nt - h.bt) % WRAP > BYTES_MAX then
    local ok, result = pcall(tidy, h, queue, kept, pushed, keyed)
    if ok then evicted = result else log_problem(result) end
  end
  ids = keep_ids(h.key, ids, v[3])
  local ok, field, state = #names > 0
  if ok then
    ok, field, state = pcall(arm, h, member, names, v)
    if not ok then log_problem(field) end
  end
  if ok and field then
    call('HSET', h.key, 's', head_state(h), 'i', ids, field, state)
  else
    call('HSET', h.key, 's', head_state(h), 'i', ids)
  end
  return evicted
end

-- Accepts the messages `m` to `last` of a user, whose arguments begin at `body`; `names` are the devices
-- with a route, `v` what `fetch` says. Returns the user's part of the reply.
local function accept(k, member, m, last, body, names, v)
  local head, queue = KEYS[k], KEYS[k + 1]
  local accepted = #names > 0 and 'O' or 'A'
  local h = v[1] and parse_head(head, v[1]) or new_head(head, CANDIDATE)
  open(h, queue, TTL)
  local ids, marks = v[2] or '', v[3]
  local e, n, chain, bytes = h.e, h.n, h.nc, h.nt
  local first, before, header, entry, parts, keyed = n, chain
  for m = m, last do
    local hash, crc, has_key = parse(MESSAGE, metas, (m - 1) * MESSAGE_BYTES + 1)
    if not is_new(m) then
      letters[m] = passed_letter(m)
    elseif is_duplicate(head, ids, marks, hash) then
      letters[m] = 'D'
    else
      local from = chain
      if n >= SEQ_MAX then error('no seq is left') end
      n, chain, ids = n + 1, chain_step(chain, crc), ids .. hash
      bytes = (bytes + HEADER_BYTES + #ARGV[body]) % WRAP
      if header then -- another before it
        parts = parts or { header, entry }
        parts[#parts + 1] = pack(HEADER, 0x09, e, 0x11, n, 0x1d, from, 0x25, chain, 0x29, NOW_US,
          bytes)
        parts[#parts + 1] = ARGV[body]
      else
        header = pack(HEADER, 0x09, e, 0x11, n, 0x1d, from, 0x25, chain, 0x29, NOW_US, bytes)
        entry = ARGV[body]
      end
      letters[m] = accepted
      if has_key == 1 then
        keyed = keyed or {}
        keyed[#keyed + 1], keyed[#keyed + 2] = n, ARGV[body + 1]
      end
    end
    body = body + 1 + has_key
  end
  if n == first then return NOT_ACCEPTED end
  if keep_until > 0 and h.b == 1 then
    keep_all(h, keep_until)
  elseif keeps_all(h) and is_short() then
    local devices = other_devices(h)
    if #devices > 0 then trim_to_lowest(h, queue, table.remove(devices), devices) end
  end
  local kept = parts and append(queue, parts) or call('RPUSH', queue, header, entry) / 2
  h.n, h.nc, h.nt = n, chain, bytes
  local evicted = settle(h, queue, member, names, v, kept, n - first, ids, keyed)
  return pack(MAILBOX, e, first, before, evicted)
end

-- The usual message, without a table: a user's only new one, no collapse key, a mailbox that is there and
-- has none, one known device at most. Does what `accept` would; everything else is left to it.
local function accept_one(k, member, m, last, body, names, v)
  local state, name, device = v[1], names[1], v[4]
  local hash, crc, has_key = parse(MESSAGE, metas, (m - 1) * MESSAGE_BYTES + 1)
  if has_key == 1 or names[2] or not state or #state ~= STATE_BYTES
    or name and not (device and #device == DEVICE_BYTES) then
    return accept(k, member, m, last, body, names, v)
  end
  local head, queue = KEYS[k], KEYS[k + 1]
  local plain, e, b, bc, n, nc, x, ct, kl, dc, bt, nt = parse(STATE, state)
  if plain ~= VERSION or x - NOW < TTL or kl ~= 0 or n >= SEQ_MAX or b == 1 and keep_until > 0 then
    return accept(k, member, m, last, body, names, v)
  end
  local ids, marks = v[2] or '', v[3]
  -- As `is_duplicate`, without calling it: its look at the marks costs most here.
  if has_id(ids, hash)
    or marks and find(marks, sub(hash, 1, 1), 2, true) and is_old(head, marks, hash) then
    letters[m] = 'D'
    return NOT_ACCEPTED
  end
  local chain = chain_step(nc, crc)
  local bytes = (nt + HEADER_BYTES + #ARGV[body]) % WRAP
  local header = pack(HEADER, 0x09, e, 0x11, n + 1, 0x1d, nc, 0x25, chain, 0x29, NOW_US, bytes)
  local kept = call('RPUSH', queue, header, ARGV[body]) / 2
  letters[m], ids = name and 'O' or 'A', ids .. hash
  local evicted = 0
  if kept ~= n - b + 2 or kept > ENTRIES_MAX + 1
    or kept > 1 and (NOW >= ct or (bytes - bt) % WRAP > BYTES_MAX) then
    local h = parse_head(head, state)
    h.n, h.nc, h.nt = n + 1, chain, bytes
    return pack(MAILBOX, e, n, nc, settle(h, queue, member, names, v, kept, 1, ids))
  elseif kept == 1 then
    call('PEXPIREAT', queue, int(x))
    ct = NOW + TTL
  elseif kept > ENTRIES_MAX then
    b, evicted = b + 1, 1
    bc, bt = header_place(call('LINDEX', queue, '0'))
    call('LTRIM', queue, '2', '-1')
  end
  if #ids >= CHUNK_BYTES then ids = keep_ids(head, ids, marks) end
  state = pack(STATE, VERSION, e, b, bc, n + 1, chain, x, ct, kl, dc, bt, bytes)
  if name then
    local due = parse('<I6', device, DUE_AT)
    if due == 0 then
      due = NOW + spread(BASE, JITTER)
      local armed = redis.pcall('ZADD', timers, int(due), member)
      if type(armed) == 'table' and armed.err then
        log_problem(armed)
      else
        call('HSET', head, 's', state, 'i', ids, 'd:' .. name,
          pack(ARMED, device, due, 0, sub(device, ARMED_UNTIL)))
        return pack(MAILBOX, e, n, nc, evicted)
      end
    end
  end
  call('HSET', head, 's', state, 'i', ids)
  return pack(MAILBOX, e, n, nc, evicted)
end

-- What there is of a user who has something new: the devices with a route, and what `fetch` says;
-- nothing is written before all of the group have been looked at.
local function look_at(k, m, last)
  if not all_new then
    local any = false
    for m = m, last do any = any or is_new(m) end
    if not any then return nil end
  end
  local names = call('HKEYS', KEYS[k + 2])
  local v = #names > 0 and fetch(KEYS[k], names) or call('HMGET', KEYS[k], 's', 'i', 'f')
  if v[1] and sub(v[1], 1, 2) ~= PLAIN then check_known(v[1]) end
  for i = 4, #names + 3 do
    if v[i] and sub(v[i], 1, 2) ~= PLAIN then check_known(v[i]) end
  end
  return names, v
end

-- Looks at all users of the group, so that nothing is written of it where one of them must not be
-- touched: returns nil then. Else the devices with a route and what `fetch` says, by user; false and
-- why, where a user cannot be read; nothing of one who has nothing new.
local function look_at_all(k, counts, users)
  local routed, held, user, m = {}, {}, 0, 1
  local function rest() -- until one fails: a pcall for each would cost more
    while user < users do
      local first = m
      m = m + (all_single and 1 or parse(COUNT, counts, user * COUNT_BYTES + 1))
      user = user + 1
      routed[user], held[user] = look_at(k + user * 3 - 3, first, m - 1)
    end
  end
  while user < users do
    local ok, problem = pcall(rest)
    if not ok then
      if is_unknown(problem) then return nil end
      routed[user], held[user] = false, problem
    end
  end
  return routed, held
end

-- As `accept`, also for a user who has nothing new (and was not looked at) or cannot be read.
local function accept_new(k, member, m, last, body, names, v)
  if names then return accept(k, member, m, last, body, names, v) end
  if names == false then error(v, 0) end
  for m = m, last do letters[m] = passed_letter(m) end
  return NOT_ACCEPTED
end

-- How many arguments the messages `m` to `last` have.
local function arguments_of(m, last)
  local count = last - m + 1
  for m = m, has_keys and last or 0 do
    local _, _, has_key = parse(MESSAGE, metas, (m - 1) * MESSAGE_BYTES + 1)
    count = count + has_key
  end
  return count
end

local function group(k, a)
  positions, timers, source = KEYS[k], KEYS[k + 1], ARGV[a]
  local has_prev, pl, po, pi, fl, fo, fi, ll, lo, li, users, arguments = parse(GROUP, ARGV[a + 1])
  local known = call('HMGET', positions, source, LOST)
  local stored = known[1]
  local l, o, i = match(stored or '-2 -1 0', '^(-?%d+) (-?%d+) (%d+)$')
  if not l then error('corrupt position') end
  l0, o0, i0 = tonumber(l), tonumber(o), tonumber(i)
  if has_prev % 2 == 1 and after(pl, po, pi, l0, o0, i0) then
    call('HSET', positions, LOST, int(NOW))
    return { 'G', stored }
  end
  local lost = known[2]
  -- Nodes write copies of their leases before devices come: without any, the shard is new or has lost everything,
  -- and this source may never have had anything for it that would tell.
  if not stored and not lost and users > 0 and call('EXISTS', KEYS[k + 2]) == 0 then
    lost = NOW
    call('HSET', positions, LOST, int(NOW))
  end
  keep_until = lost and tonumber(lost) + KEEP or 0
  if keep_until <= NOW or keep_until - NOW > KEEP or is_short() then keep_until = 0 end
  local counts = ARGV[a + 2]
  metas, letters = ARGV[a + 3], {}
  all_new = after(fl, fo, fi, l0, o0, i0)
  local messages = #metas / MESSAGE_BYTES
  has_keys, all_single = arguments > 4 + users + messages, users == messages
  local routed, held = look_at_all(k + 3, counts, users)
  if not routed then return { 'U' } end
  local mailboxes, problems, member, body = {}, {}, a + 4, a + 4 + users
  local user, m = 0, 1
  local function rest() -- until one fails: a pcall for each would cost more
    while user < users do
      local last = all_single and m or m + parse(COUNT, counts, user * COUNT_BYTES + 1) - 1
      local names = routed[user + 1]
      mailboxes[user + 1] = (names and m == last and accept_one or accept_new)(k + 3 + user * 3,
        ARGV[member + user], m, last, body, names, held[user + 1])
      body = body + (has_keys and arguments_of(m, last) or last - m + 1)
      user, m = user + 1, last + 1
    end
  end
  while user < users do
    local ok, problem = pcall(rest)
    if not ok then
      local last = m + parse(COUNT, counts, user * COUNT_BYTES + 1) - 1
      mailboxes[user + 1] = NOT_ACCEPTED
      for m = m, last do
        if is_new(m) then
          letters[m], problems[m] = 'F', problem_text(problem)
          note_failure(m)
        else
          letters[m] = passed_letter(m)
        end
      end
      body = body + arguments_of(m, last)
      user, m = user + 1, last + 1
    end
  end
  if users > 0 or has_prev > 1 then -- always something: a WAIT behind it waits for all that was before
    local passed = after(ll, lo, li, l0, o0, i0) and position_text(ll, lo, li) or stored
    if passed then call('HSET', positions, source, passed) end
  end
  local told = table.concat(letters)
  local reply = { 'D', told, table.concat(mailboxes) }
  for m = find(told, 'F', 1, true) or #told + 1, #told do
    if letters[m] == 'F' then
      reply[#reply + 1] = problems[m] or 'failed when it was accepted first'
    end
  end
  return reply
end

local replies, k, a = { NOW_US }, 1, 9
for g = 1, tonumber(ARGV[8]) do
  local _, _, _, _, _, _, _, _, _, _, users, arguments = parse(GROUP, ARGV[a + 1])
  local ok, reply = pcall(group, k, a)
  if not ok then reply = { 'E', problem_text(reply) } end
  replies[g + 1] = reply
  k, a = k + 3 + users * 3, a + arguments
end
return replies
