-- Third part of the scripts that append entries to mailboxes: entries, accepted ids, bounds, and the timers of
-- devices with a route.
--
-- A caller fetches what is stored (`fetch`), makes an entry's header and body, appends them, and settles the mailbox.
-- `stored` is what `fetch` returned: the state, the newest ids, the marks of older ids, then a device for each name.

local char, unpack = string.char, unpack
local ID_BYTES, IDS_PER_CHUNK, CHUNKS = 8, 8, 7
local CHUNK_BYTES = ID_BYTES * IDS_PER_CHUNK
local VOIDED_COLLAPSED = '\128\1\4' -- Envelope.voided = SKIP_REASON_COLLAPSED
-- A stored header: each number behind its protobuf tag.
local HEADER = '<BI8BI8BIBIBI8I'
local EPOCH_TAG, SEQ_TAG, CHAIN_BEFORE_TAG, CHAIN_TAG, ACCEPTED_AT_TAG = 0x09, 0x11, 0x1d, 0x25, 0x29
local WRAP = 4294967296
local ELEMENTS_MAX = 1000 -- list elements in one call: Lua unpacks a few thousand at most

-- Settings of the call, set by the script: bounds of a mailbox.
local ENTRIES_MAX, BYTES_MAX

-- The state, the newest ids, the marks of older ids, and the devices with these names.
local function fetch(head, names)
  if #names == 0 then return call('HMGET', head, 's', 'i', 'f') end
  if #names == 1 then return call('HMGET', head, 's', 'i', 'f', 'd:' .. names[1]) end
  local fields = {}
  for i, name in ipairs(names) do fields[i] = 'd:' .. name end
  return call('HMGET', head, 's', 'i', 'f', unpack(fields))
end

-- Whether one of the newest ids is this one: it has to begin at a multiple of eight.
local function has_id(ids, id)
  local at = find(ids, id, 1, true)
  while at do
    if (at - 1) % ID_BYTES == 0 then return true end
    at = find(ids, id, at + 1, true)
  end
  return false
end

-- Whether one of the older ids is this one. `marks` holds the number of the next chunk, then the ids' first bytes.
local function is_old(head, marks, id)
  local mark = sub(id, 1, 1)
  local at = find(marks, mark, 2, true)
  while at do
    local from = (at - 2) % IDS_PER_CHUNK * ID_BYTES
    local chunk = call('HGET', head, 'j' .. floor((at - 2) / IDS_PER_CHUNK))
    if chunk and sub(chunk, from + 1, from + ID_BYTES) == id then return true end
    at = find(marks, mark, at + 1, true)
  end
  return false
end

-- Whether a message with this id is among the last that were accepted.
local function is_duplicate(head, ids, marks, id)
  return has_id(ids, id) or marks and is_old(head, marks, id)
end

-- Moves full chunks of eight ids out of `ids`; each replaces the oldest chunk. Returns the ids that are left.
local function keep_ids(head, ids, marks)
  if #ids < CHUNK_BYTES then return ids end
  local full = floor(#ids / CHUNK_BYTES)
  local fields, chunk, slot = full > 1 and {}
  marks = marks or '\0'
  for number = max(full - CHUNKS, 0), full - 1 do
    local next, from = byte(marks), number * CHUNK_BYTES
    chunk, slot = sub(ids, from + 1, from + CHUNK_BYTES), 'j' .. next
    if fields then fields[#fields + 1], fields[#fields + 2] = slot, chunk end
    marks = char((next + 1) % CHUNKS) .. sub(marks, 2, next * IDS_PER_CHUNK + 1)
      .. char(byte(chunk), byte(chunk, 9), byte(chunk, 17), byte(chunk, 25), byte(chunk, 33),
        byte(chunk, 41), byte(chunk, 49), byte(chunk, 57))
      .. sub(marks, (next + 1) * IDS_PER_CHUNK + 2)
  end
  if fields then
    fields[#fields + 1], fields[#fields + 2] = 'f', marks
    call('HSET', head, unpack(fields))
  else -- the usual case, without a table
    call('HSET', head, slot, chunk, 'f', marks)
  end
  return sub(ids, full * CHUNK_BYTES + 1)
end

-- The stored header of a new entry; `bytes` is bytes_to_newest as of it.
local function new_header(epoch, seq, chain_before, chain, bytes)
  return pack(HEADER, EPOCH_TAG, epoch, SEQ_TAG, seq, CHAIN_BEFORE_TAG, chain_before, CHAIN_TAG,
    chain, ACCEPTED_AT_TAG, NOW_US, bytes)
end

-- Appends entries, headers and bodies in turn. Returns how many entries the list now has.
local function append(queue, parts)
  if #parts == 2 then return call('RPUSH', queue, parts[1], parts[2]) / 2 end
  local length
  for first = 1, #parts, ELEMENTS_MAX do
    length = call('RPUSH', queue, unpack(parts, first, min(first + ELEMENTS_MAX - 1, #parts)))
  end
  return length / 2
end

-- The entry at `seq` has a collapse key: an older one with the same key keeps its seq and loses its content.
local function collapse(mailbox, seq, key)
  local older = tonumber(call('HGET', mailbox.head, 'k:' .. key))
  if older and older >= mailbox.oldest and older < seq then
    call('LSET', mailbox.queue, int((older - mailbox.oldest) * 2 + 1), VOIDED_COLLAPSED)
  end
  call('HSET', mailbox.head, 'k:' .. key, int(seq))
  if mailbox.lowest_keyed == 0 then mailbox.lowest_keyed = seq end
end

-- Evicts the entries beyond the mailbox's bounds and those that are too old, never the newest. Returns how many.
local function evict(mailbox)
  local newest, bytes_to_newest = mailbox.newest, mailbox.bytes_to_newest
  local seq, chain = mailbox.oldest - 1, mailbox.chain_before_oldest
  local bytes = mailbox.bytes_before_oldest
  while seq + 1 < newest
    and (newest - seq > ENTRIES_MAX or (bytes_to_newest - bytes) % WRAP > BYTES_MAX) do
    seq = seq + 1
    chain, bytes = header_end(header_at(mailbox, seq))
  end
  if NOW >= mailbox.age_check_at then
    mailbox.age_check_at = NOW + TTL
    while seq + 1 < newest do
      local header = header_at(mailbox, seq + 1)
      local too_old_at = floor(parse('<I8', header, 30) / 1000) + TTL
      if too_old_at > NOW then
        mailbox.age_check_at = too_old_at
        break
      end
      seq = seq + 1
      chain, bytes = header_end(header)
    end
  end
  local evicted = seq - mailbox.oldest + 1
  trim(mailbox, seq, chain, bytes)
  return evicted
end

-- Corrects a state that does not match the list after an append, collapses, and evicts. Returns how many entries
-- were evicted. Arguments as of `settle`.
local function tidy(mailbox, length, appended, keyed)
  if length ~= mailbox.newest - mailbox.oldest + 1 then
    -- Redis lost entries at the front: the list is right.
    local header = call('LINDEX', mailbox.queue, '0')
    local _, _, seq, _, chain_before = parse('<I8BI8BI4', header, 2)
    local _, bytes = header_end(header)
    mailbox.oldest, mailbox.chain_before_oldest = seq, chain_before
    mailbox.bytes_before_oldest =
      (bytes - HEADER_BYTES - #call('LINDEX', mailbox.queue, '1')) % WRAP
  end
  if length == appended then -- the list is new
    call('PEXPIREAT', mailbox.queue, int(mailbox.expires_at))
    mailbox.age_check_at = NOW + TTL
  end
  for i = 1, keyed and #keyed or 0, 2 do collapse(mailbox, keyed[i], keyed[i + 1]) end
  return evict(mailbox)
end

-- Arms every device with a route that is not armed: it had everything before this append. Returns the field and state
-- of the last of them, which the caller saves.
local function arm(mailbox, timers, member, names, stored)
  local earliest, field, state
  for i, name in ipairs(names) do
    local text = stored[i + 3]
    local device = text and parse_device(name, text) or new_device(mailbox, name, 0)
    if not text then -- the route outlived the head
      if mailbox.device_count >= BYTE_MAX then error('too many devices') end
      call('HSET', mailbox.head, 'n' .. mailbox.device_count, name)
      mailbox.device_count = mailbox.device_count + 1
    end
    if device.due_at == 0 then
      if field then call('HSET', mailbox.head, field, state) end
      arm_device(device)
      field, state = 'd:' .. name, device_state(device)
    end
    if not earliest or device.due_at < earliest then earliest = device.due_at end
  end
  if field then call('ZADD', timers, int(earliest), member) end
  return field, state
end

local function log_problem(problem)
  redis.log(redis.LOG_WARNING, 'barid, after an append: ' .. error_text(problem))
end

-- What follows an append of `appended` entries, which left `length` in the list: the mailbox's bounds, ids, timers,
-- and the state. `ids` includes the new ones; `keyed` lists the seq and the collapse key of each new entry that has
-- one, or is nil. Returns how many entries were evicted. The append stands: an error here is logged.
local function settle(mailbox, timers, member, names, stored, length, appended, ids, keyed)
  local evicted = 0
  if keyed or length ~= mailbox.newest - mailbox.oldest + 1 or length == appended
    or length > ENTRIES_MAX or NOW >= mailbox.age_check_at
    or (mailbox.bytes_to_newest - mailbox.bytes_before_oldest) % WRAP > BYTES_MAX then
    local ok, result = pcall(tidy, mailbox, length, appended, keyed)
    if ok then evicted = result else log_problem(result) end
  end
  ids = keep_ids(mailbox.head, ids, stored[3])
  local ok, field, state = #names > 0
  if ok then
    ok, field, state = pcall(arm, mailbox, timers, member, names, stored)
    if not ok then log_problem(field) end
  end
  if ok and field then
    call('HSET', mailbox.head, 's', mailbox_state(mailbox), 'i', ids, field, state)
  else
    call('HSET', mailbox.head, 's', mailbox_state(mailbox), 'i', ids)
  end
  return evicted
end
