-- accept: appends messages to mailboxes, in the order of the log. Refused when Redis is full.
--
-- KEYS  a group: positions {s}:o, timers {s}:t, copies of leases {s}:n; then each owner of a mailbox (called user
--       below): head, queue, and a user's routes or the nodes with members of an audience; then, if it has messages for
--       audiences, the journal {s}:j.
-- ARGV  entries_max, mailbox_bytes_max, ttl ms, retry base ms, retry jitter, epoch candidate, how long mailboxes keep
--       all after a loss (ms), number of groups; then a group: source; packed (GROUP): 1 if there is a
--       prev else 0, plus 2 if an empty group raises the stored position to its last one, plus 4 if it has messages
--       for audiences; prev, first position, last
--       position, number of users, number of arguments of the group; packed, number of messages of each user
--       (COUNT); packed, each message (MESSAGE): 8-byte id hash, CRC-32 of the id, 1 if it has a collapse key
--       else 0, plus 2 if it is for an audience, position; then each user's member (app NUL user), or the bounds of
--       the audience's mailbox, packed (BOUNDS), and its member; then each message's body, and its collapse key if
--       it has one. A user's messages are adjacent, in the order of the log.
--       A position: leader epoch, offset, index.
-- Reply now, then a group:
--       {'G', stored position or false}  a batch in between was never executed, or Redis lost it: nothing was written
--                    but the time of this reply (LOST)
--       {'U'}        this version must not touch one of its mailboxes: nothing was written
--       {'E', text}  the shard's positions cannot be read
--       {'D', outcomes, mailboxes, if there are audiences: nodes, text of each failed message}  outcomes: a letter for
--                    each message; mailboxes, packed for each user (MAILBOX): epoch, seq and chain before the first new
--                    entry, evicted entries; nodes: for each audience a list of the nodes with members
--
-- The stored position of a source, "leader offset index", moves together with the appends: no other script
-- runs between them and the end of the group, and no error skips it. A user's messages are appended in one call, so
-- they fail together. A failed message is noted in the field "<source>!" (the last FAILED_BYTES_MAX bytes), so that it
-- is reported as failed, not as accepted before, when it is delivered again. An error after the append (timers, trim)
-- must not undo it: that part runs in a pcall of its own.

ENTRIES_MAX, BYTES_MAX, TTL = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3])
RETRY_BASE, RETRY_JITTER = tonumber(ARGV[4]), tonumber(ARGV[5])
local EPOCH_CANDIDATE, KEEP_AFTER_LOSS = ARGV[6], tonumber(ARGV[7])
local GROUP, COUNT, COUNT_BYTES = '<BidIidIidIII', '<I', 4
local MESSAGE, MESSAGE_BYTES, POSITION, POSITION_AT = '<c8IB', 29, '<idI', 14
local FOR_AUDIENCE, MESSAGE_FLAGS_AT = 2, 13
-- Of an audience's mailbox: entries, bytes, ttl ms; then app NUL audience.
local BOUNDS = '<ddd'
local BOUNDS_BYTES = 24
local JOURNAL_MAX = 10000 -- audiences
local MAILBOX = '<ddII'
local NOT_ACCEPTED = pack(MAILBOX, 0, 0, 0, 0)
local ACCEPTED, ACCEPTED_ONLINE, ACCEPTED_BEFORE, DUPLICATE, FAILED = 'A', 'O', 'B', 'D', 'F'
local FAILED_BYTES_MAX = 2048
-- Of a device: where its due_at is; what arming writes (due_at and resends, between bytes that stay); what follows.
local DUE_AT, ARMED, AFTER_ARMED = 17, '<c16I6Bc0', 24
local UNFLAGGED = char(VERSION, 0) -- a mark without flags

-- Whether a position is behind another one in the log.
local function is_after(leader, offset, index, other_leader, other_offset, other_index)
  if leader ~= other_leader then return leader > other_leader end
  if offset ~= other_offset then return offset > other_offset end
  return index > other_index
end

local function position_text(leader, offset, index)
  return format('%d %d %d', leader, offset, index)
end

-- The position of a message, given by its number in the group.
local function position_of(group, message)
  return parse(POSITION, group.messages, (message - 1) * MESSAGE_BYTES + POSITION_AT)
end

-- Whether a message is behind the stored position.
local function is_new(group, message)
  if group.all_new then return true end
  local leader, offset, index = position_of(group, message)
  return is_after(leader, offset, index, group.leader, group.offset, group.index)
end

-- The outcome of a message that is not new.
local function outcome_before(group, message)
  local failed = call('HGET', group.positions, group.source .. '!') or ''
  local line = '\n' .. position_text(position_of(group, message)) .. '\n'
  return find(failed, line, 1, true) and FAILED or ACCEPTED_BEFORE
end

local function note_failure(group, message)
  local field = group.source .. '!'
  local failed = (call('HGET', group.positions, field) or '\n')
    .. position_text(position_of(group, message)) .. '\n'
  call('HSET', group.positions, field, sub(failed, -FAILED_BYTES_MAX))
end

-- Appends two values to a list, which may be nil. Returns the list.
local function with_pair(list, first, second)
  if not list then return { first, second } end
  local length = #list
  list[length + 1], list[length + 2] = first, second
  return list
end

-- Whether a message is for an audience, given by its number in the group.
local function is_for_audience(group, message)
  return group.has_audiences
    and byte(group.messages, (message - 1) * MESSAGE_BYTES + MESSAGE_FLAGS_AT) >= FOR_AUDIENCE
end

-- Appends an owner's messages, numbers `first` to `last`. The owner's keys begin at `key_at`, the bodies at `body_at`;
-- `names` are the devices with a route, `stored` is what `fetch` returned. Returns the owner's part of the reply.
local function accept_all(group, key_at, member, first, last, body_at, names, stored)
  local head, queue = KEYS[key_at], KEYS[key_at + 1]
  local messages, outcomes = group.messages, group.outcomes
  local accepted = #names > 0 and ACCEPTED_ONLINE or ACCEPTED
  local mailbox = stored[1] and parse_mailbox(head, queue, stored[1])
    or new_mailbox(head, queue, EPOCH_CANDIDATE)
  open(mailbox)
  local ids, marks, epoch = stored[2] or '', stored[3], mailbox.epoch
  local newest, chain, bytes = mailbox.newest, mailbox.newest_chain, mailbox.bytes_to_newest
  local newest_before, chain_before = newest, chain
  local parts, keyed -- parts: headers and bodies in turn
  for message = first, last do
    local id, crc, flags = parse(MESSAGE, messages, (message - 1) * MESSAGE_BYTES + 1)
    local has_key = flags % 2
    if not is_new(group, message) then
      outcomes[message] = outcome_before(group, message)
    elseif is_duplicate(head, ids, marks, id) then
      outcomes[message] = DUPLICATE
    else
      if newest >= SEQ_MAX then error('no seq is left') end
      local body, previous_chain = ARGV[body_at], chain
      newest, chain, ids = newest + 1, chain_step(chain, crc), ids .. id
      bytes = (bytes + HEADER_BYTES + #body) % WRAP
      parts = with_pair(parts, new_header(epoch, newest, previous_chain, chain, bytes), body)
      outcomes[message] = accepted
      if has_key == 1 then keyed = with_pair(keyed, newest, ARGV[body_at + 1]) end
    end
    body_at = body_at + 1 + has_key
  end
  if newest == newest_before then return NOT_ACCEPTED end
  if member == '' then -- an audience: no acknowledgement drops its entries
  elseif group.keep_until > 0 and mailbox.oldest == 1 then
    keep_all(mailbox, group.keep_until)
  elseif keeps_all(mailbox) and is_memory_short() then
    local devices = other_devices(mailbox)
    if #devices > 0 then trim_acknowledged(mailbox, table.remove(devices), devices) end
  end
  local length = append(queue, parts)
  mailbox.newest, mailbox.newest_chain, mailbox.bytes_to_newest = newest, chain, bytes
  local evicted = settle(mailbox, group.timers, member, names, stored, length,
    newest - newest_before, ids, keyed)
  return pack(MAILBOX, epoch, newest_before, chain_before, evicted)
end

-- Enters an audience into the shard's journal, which nodes read to learn of messages that did not reach them. The number
-- of a message rises by one in the shard, and is never below its time of acceptance, µs.
--
-- journal  {s}:j  zset: app NUL audience -> number of its newest message; '' -> the highest number that was trimmed
local function enter_journal(journal, member, count)
  local last = call('ZREVRANGE', journal, '0', '0', 'WITHSCORES')[2]
  local number = max((tonumber(last) or 0) + count, NOW_US + count - 1)
  call('ZADD', journal, int(number), member)
  local excess = call('ZCARD', journal) - JOURNAL_MAX
  if excess <= 0 then return end
  local trimmed = call('ZRANGE', journal, int(excess), int(excess), 'WITHSCORES')[2]
  call('ZREMRANGEBYRANK', journal, '0', int(excess))
  call('ZADD', journal, trimmed, '')
end

-- As `accept_all`, for an audience: its mailbox has bounds of its own, and no devices.
local function accept_for_audience(group, key_at, bounds, first, last, body_at, nodes, stored)
  local entries_max, bytes_max, ttl = ENTRIES_MAX, BYTES_MAX, TTL
  ENTRIES_MAX, BYTES_MAX, TTL = parse(BOUNDS, bounds)
  local ok, mailbox = pcall(accept_all, group, key_at, '', first, last, body_at, {}, stored)
  ENTRIES_MAX, BYTES_MAX, TTL = entries_max, bytes_max, ttl
  if not ok then error(mailbox, 0) end
  if mailbox ~= NOT_ACCEPTED then
    local count = 0
    for message = first, last do
      if group.outcomes[message] == ACCEPTED then count = count + 1 end
    end
    local entered, problem = pcall(enter_journal, group.journal, sub(bounds, BOUNDS_BYTES + 1), count)
    if not entered then log_problem(problem) end
  end
  return mailbox
end

local function accept(group, key_at, member, first, last, body_at, names, stored)
  local for_owner = is_for_audience(group, first) and accept_for_audience or accept_all
  return for_owner(group, key_at, member, first, last, body_at, names, stored)
end

-- Short path for the usual message: the user's only one in the group, new, without a collapse key, to a mailbox
-- that exists and has no collapse keys, and at most one device with a route. It allocates no table and leaves what
-- `accept` would leave; everything else goes there.
local function accept_one(group, key_at, member, message, last, body_at, names, stored)
  local state, name, device = stored[1], names[1], stored[4]
  local id, crc, flags = parse(MESSAGE, group.messages, (message - 1) * MESSAGE_BYTES + 1)
  if flags ~= 0 or names[2] or not state or #state ~= STATE_BYTES
    or name and not (device and #device == DEVICE_BYTES) then
    return accept(group, key_at, member, message, last, body_at, names, stored)
  end
  local head, queue, body = KEYS[key_at], KEYS[key_at + 1], ARGV[body_at]
  local mark, epoch, oldest, chain_before_oldest, newest, newest_chain, expires_at, age_check_at,
    lowest_keyed, device_count, bytes_before_oldest, bytes_to_newest = parse(STATE, state)
  if mark ~= VERSION or expires_at - NOW < TTL or lowest_keyed ~= 0 or newest >= SEQ_MAX
    or oldest == 1 and group.keep_until > 0 then
    return accept(group, key_at, member, message, last, body_at, names, stored)
  end
  local ids, marks = stored[2] or '', stored[3]
  -- `is_duplicate` without the call: searching the marks costs most here.
  if has_id(ids, id) or marks and find(marks, sub(id, 1, 1), 2, true) and is_old(head, marks, id) then
    group.outcomes[message] = DUPLICATE
    return NOT_ACCEPTED
  end
  local seq, chain = newest + 1, chain_step(newest_chain, crc)
  local bytes = (bytes_to_newest + HEADER_BYTES + #body) % WRAP
  -- `new_header` without the call.
  local header = pack(HEADER, EPOCH_TAG, epoch, SEQ_TAG, seq, CHAIN_BEFORE_TAG, newest_chain,
    CHAIN_TAG, chain, ACCEPTED_AT_TAG, NOW_US, bytes)
  local length = call('RPUSH', queue, header, body) / 2
  group.outcomes[message], ids = name and ACCEPTED_ONLINE or ACCEPTED, ids .. id
  local evicted = 0
  if length ~= seq - oldest + 1 or length > ENTRIES_MAX + 1
    or length > 1 and (NOW >= age_check_at or (bytes - bytes_before_oldest) % WRAP > BYTES_MAX) then
    local mailbox = parse_mailbox(head, queue, state)
    mailbox.newest, mailbox.newest_chain, mailbox.bytes_to_newest = seq, chain, bytes
    return pack(MAILBOX, epoch, newest, newest_chain,
      settle(mailbox, group.timers, member, names, stored, length, 1, ids))
  elseif length == 1 then
    call('PEXPIREAT', queue, int(expires_at))
    age_check_at = NOW + TTL
  elseif length > ENTRIES_MAX then
    oldest, evicted = oldest + 1, 1
    chain_before_oldest, bytes_before_oldest = header_end(call('LINDEX', queue, '0'))
    call('LTRIM', queue, '2', '-1')
  end
  if #ids >= CHUNK_BYTES then ids = keep_ids(head, ids, marks) end
  state = pack(STATE, VERSION, epoch, oldest, chain_before_oldest, seq, chain, expires_at,
    age_check_at, lowest_keyed, device_count, bytes_before_oldest, bytes)
  if name and parse('<I6', device, DUE_AT) == 0 then
    local due_at = NOW + spread(RETRY_BASE)
    local armed = redis.pcall('ZADD', group.timers, int(due_at), member)
    if type(armed) == 'table' and armed.err then
      log_problem(armed)
    else
      call('HSET', head, 's', state, 'i', ids, 'd:' .. name,
        pack(ARMED, device, due_at, 0, sub(device, AFTER_ARMED)))
      return pack(MAILBOX, epoch, newest, newest_chain, evicted)
    end
  end
  call('HSET', head, 's', state, 'i', ids)
  return pack(MAILBOX, epoch, newest, newest_chain, evicted)
end

-- The devices with a route of a user, and what is stored; nil if none of the messages is new. Fails if this
-- version must not touch the mailbox.
local function read_user(group, key_at, first, last)
  if not group.all_new then
    local any_new = false
    for message = first, last do any_new = any_new or is_new(group, message) end
    if not any_new then return nil end
  end
  local names = call('HKEYS', KEYS[key_at + 2])
  if is_for_audience(group, first) then
    local stored = fetch(KEYS[key_at], {})
    if stored[1] then check_known(stored[1]) end
    return names, stored
  end
  local stored = fetch(KEYS[key_at], names)
  if stored[1] and sub(stored[1], 1, 2) ~= UNFLAGGED then check_known(stored[1]) end
  for i = 4, #names + 3 do
    if stored[i] and sub(stored[i], 1, 2) ~= UNFLAGGED then check_known(stored[i]) end
  end
  return names, stored
end

-- How many messages a user has, given by its number in the group, from 0.
local function count_of(group, user)
  return (parse(COUNT, group.counts, user * COUNT_BYTES + 1))
end

-- Reads all users of the group before anything is written. Returns two lists, what `read_user` returned of each; of a
-- user who cannot be read, false and why. Returns nil if this version must not touch one of the mailboxes.
local function read_users(group)
  local names, stored, users, one_each = {}, {}, group.users, group.one_each
  local user, message, key_at = 0, 1, group.key_at
  local function rest() -- until one fails: one pcall per user would cost more
    while user < users do
      local first = message
      message, user, key_at = message + (one_each and 1 or count_of(group, user)), user + 1, key_at + 3
      names[user], stored[user] = read_user(group, key_at, first, message - 1)
    end
  end
  while user < users do
    local ok, problem = pcall(rest)
    if not ok then
      if is_unknown(problem) then return nil end
      names[user], stored[user] = false, problem
    end
  end
  return names, stored
end

-- `accept`, also for a user who has nothing new (and was not read) or cannot be read.
local function accept_any(group, key_at, member, first, last, body_at, names, stored)
  if names then return accept(group, key_at, member, first, last, body_at, names, stored) end
  if names == false then error(stored, 0) end
  for message = first, last do group.outcomes[message] = outcome_before(group, message) end
  return NOT_ACCEPTED
end

-- How many arguments the messages from `first` to `last` have.
local function count_arguments(group, first, last)
  local count = last - first + 1
  for message = first, last do
    local _, _, flags = parse(MESSAGE, group.messages, (message - 1) * MESSAGE_BYTES + 1)
    count = count + flags % 2
  end
  return count
end

-- Accepts the messages of all users. Returns the mailboxes' part of the reply, and the error text of each failed
-- message by its number.
local function accept_users(group, names, stored)
  local mailboxes, problems = {}, {}
  local users, one_each, has_keys = group.users, group.one_each, group.has_keys
  local key_at, member_at = group.key_at + 3, group.arg_at + 4
  local user, first, body_at = 0, 1, member_at + users
  local function rest() -- until one fails: one pcall per user would cost more
    while user < users do
      local last = one_each and first or first + count_of(group, user) - 1
      local routed = names[user + 1]
      local step = routed and first == last and accept_one or accept_any
      mailboxes[user + 1] = step(group, key_at + user * 3, ARGV[member_at + user], first, last,
        body_at, routed, stored[user + 1])
      body_at = body_at + (has_keys and count_arguments(group, first, last) or last - first + 1)
      user, first = user + 1, last + 1
    end
  end
  while user < users do
    local ok, problem = pcall(rest)
    if not ok then
      local last = first + count_of(group, user) - 1
      mailboxes[user + 1] = NOT_ACCEPTED
      for message = first, last do
        if is_new(group, message) then
          group.outcomes[message], problems[message] = FAILED, error_text(problem)
          note_failure(group, message)
        else
          group.outcomes[message] = outcome_before(group, message)
        end
      end
      body_at = body_at + count_arguments(group, first, last)
      user, first = user + 1, last + 1
    end
  end
  return mailboxes, problems
end

-- Until when mailboxes that have not dropped anything keep acknowledged entries; 0: they do not. `lost` is when data of
-- the shard was found missing, if it was.
local function keep_until_after(lost)
  if not lost then return 0 end
  local keep_until = tonumber(lost) + KEEP_AFTER_LOSS
  if keep_until <= NOW or keep_until - NOW > KEEP_AFTER_LOSS or is_memory_short() then return 0 end
  return keep_until
end

-- The nodes of each audience of the group, in order.
local function nodes_of(group, names)
  local nodes, message = {}, 1
  for user = 1, group.users do
    if is_for_audience(group, message) then nodes[#nodes + 1] = names[user] or {} end
    message = message + count_of(group, user - 1)
  end
  return nodes
end

-- Runs the group whose keys and arguments begin here. Returns its reply.
local function run_group(key_at, arg_at)
  local positions, source, messages = KEYS[key_at], ARGV[arg_at], ARGV[arg_at + 3]
  local flags, prev_leader, prev_offset, prev_index, first_leader, first_offset, first_index,
    last_leader, last_offset, last_index, users, arguments = parse(GROUP, ARGV[arg_at + 1])
  local known = call('HMGET', positions, source, LOST)
  local stored_position, lost = known[1], known[2]
  local leader, offset, index = match(stored_position or '-2 -1 0', '^(-?%d+) (-?%d+) (%d+)$')
  if not leader then error('corrupt position') end
  leader, offset, index = tonumber(leader), tonumber(offset), tonumber(index)
  if flags % 2 == 1 and is_after(prev_leader, prev_offset, prev_index, leader, offset, index) then
    call('HSET', positions, LOST, int(NOW))
    return { 'G', stored_position }
  end
  -- Nodes write copies of their leases before devices connect: without any, the shard is new or has lost everything,
  -- and this source may never have had a position here that would show it.
  if not stored_position and not lost and users > 0 and call('EXISTS', KEYS[key_at + 2]) == 0 then
    lost = NOW
    call('HSET', positions, LOST, int(NOW))
  end
  local count = #messages / MESSAGE_BYTES
  local group = {
    key_at = key_at, arg_at = arg_at, users = users,
    positions = positions, timers = KEYS[key_at + 1], source = source,
    -- Packed: how many messages each user has, and the messages. By number of the message: its letter in the reply.
    counts = ARGV[arg_at + 2], messages = messages, outcomes = {},
    -- The stored position.
    leader = leader, offset = offset, index = index,
    -- Whether all messages are behind it, any has a collapse key, and each is its user's only one.
    all_new = is_after(first_leader, first_offset, first_index, leader, offset, index),
    has_keys = arguments > 4 + users + count, one_each = users == count,
    has_audiences = flags >= 4, journal = flags >= 4 and KEYS[key_at + 3 + users * 3],
    keep_until = keep_until_after(lost),
  }
  local names, stored = read_users(group)
  if not names then return { 'U' } end
  local mailboxes, problems = accept_users(group, names, stored)
  if users > 0 or flags % 4 > 1 then -- always writes something: a WAIT after it covers everything before
    local position = is_after(last_leader, last_offset, last_index, leader, offset, index)
      and position_text(last_leader, last_offset, last_index) or stored_position
    if position then call('HSET', positions, source, position) end
  end
  local outcomes = table.concat(group.outcomes)
  local reply = { 'D', outcomes, table.concat(mailboxes) }
  if group.has_audiences then reply[4] = nodes_of(group, names) end
  for message = find(outcomes, FAILED, 1, true) or count + 1, count do
    if group.outcomes[message] == FAILED then
      reply[#reply + 1] = problems[message] or 'failed when it was accepted first'
    end
  end
  return reply
end

local replies, key_at, arg_at = { NOW_US }, 1, 9
for number = 1, tonumber(ARGV[8]) do
  local flags, _, _, _, _, _, _, _, _, _, users, arguments = parse(GROUP, ARGV[arg_at + 1])
  local ok, reply = pcall(run_group, key_at, arg_at)
  replies[number + 1] = ok and reply or { 'E', error_text(reply) }
  key_at, arg_at = key_at + 3 + users * 3 + (flags >= 4 and 1 or 0), arg_at + arguments
end
return replies
